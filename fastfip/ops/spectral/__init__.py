"""Ops `spectral_linear` and `spectral_conv`: a layer that moves along its singular directions."""
