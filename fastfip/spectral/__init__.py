"""The spectral-shift parametrisation of weights (Fast FIP) and its exact fold-back."""

from .shift import Shift, SpectralShifts

__all__ = ["Shift", "SpectralShifts"]
