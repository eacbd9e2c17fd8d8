"""What is done to a model for the length of a block, and what is asked of it: flags, copies, precision, device."""
