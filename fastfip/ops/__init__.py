"""Ops: each file has one contract, its reference in torch, its table of backends, autograd and the public functions."""
