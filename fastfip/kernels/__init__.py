"""Launchers: tensors in, tensors out. No autograd, no choice of backend; importing them never fails."""
