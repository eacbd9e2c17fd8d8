"""The spectral-shift parametrisation of weights (Fast FIP) and its exact fold-back."""

from fastfip.spectral.decompose import Rank
from fastfip.spectral.shift import SpectralShifts
from fastfip.spectral.weight import SpectralShift

__all__ = ["Rank", "SpectralShift", "SpectralShifts"]
