"""The worst that a small change of the inputs can do, found on clean data."""
