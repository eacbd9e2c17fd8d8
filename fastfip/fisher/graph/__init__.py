"""Per-sample gradients of every parameter, read from the autograd graph of one batch."""
