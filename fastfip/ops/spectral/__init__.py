"""Ops `spectral_linear` and `spectral_conv`: a layer that moves along its singular directions.

Op `spectral_grad`: the gradients of its singular values, sample by sample; files that begin with grad.
"""
