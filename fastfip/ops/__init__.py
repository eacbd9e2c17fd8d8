"""Ops: each file has one contract, its reference in torch, its table of backends, autograd and the public functions."""

from fastfip.ops.convolution import ConvShape
from fastfip.ops.grad_norm_squared.convolution import grad_norm_squared_conv
from fastfip.ops.grad_norm_squared.op import grad_norm_squared
from fastfip.ops.gram_apply.op import gram_apply
from fastfip.ops.registry import OPS, Backend, Op
from fastfip.ops.spectral.apply import spectral_adjoint, spectral_apply
from fastfip.ops.spectral.grad import spectral_grad, spectral_sum_grad_squared
from fastfip.ops.sum_grad_squared.op import sum_grad_squared, sum_grad_squared_conv

__all__ = [
    "OPS",
    "Backend",
    "ConvShape",
    "Op",
    "grad_norm_squared",
    "grad_norm_squared_conv",
    "gram_apply",
    "spectral_adjoint",
    "spectral_apply",
    "spectral_grad",
    "spectral_sum_grad_squared",
    "sum_grad_squared",
    "sum_grad_squared_conv",
]
