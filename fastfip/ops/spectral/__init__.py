"""Ops `spectral_linear` and `spectral_conv`: a layer that moves along its singular directions.

Ops `spectral_apply` and `spectral_adjoint`: the same layer as operators of torch; files that begin with apply.
Op `spectral_grad`: the gradients of its singular values, sample by sample; files that begin with grad.
"""
