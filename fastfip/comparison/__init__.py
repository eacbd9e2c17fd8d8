"""Several methods on one model, side by side."""
