"""Fisher Information guided Purification as it was published (FIP, arXiv 2409.00863, CCS 2024), and Fast FIP."""

from fastfip.methods.fip.method import FIP, FastFIP, FastFIPConfig, FIPConfig

__all__ = ["FIP", "FIPConfig", "FastFIP", "FastFIPConfig"]
