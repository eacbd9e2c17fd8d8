"""Ops: each file has one contract, its reference in torch, its table of backends, autograd and the public functions."""

from .grad_norm_squared import grad_norm_squared
from .grad_norm_squared_conv import grad_norm_squared_conv
from .gram_apply import gram_apply
from .registry import OPS, Backend, Op
from .sum_grad_squared import sum_grad_squared, sum_grad_squared_conv
from .unfold import ConvShape

__all__ = [
    "OPS",
    "Backend",
    "ConvShape",
    "Op",
    "grad_norm_squared",
    "grad_norm_squared_conv",
    "gram_apply",
    "sum_grad_squared",
    "sum_grad_squared_conv",
]
