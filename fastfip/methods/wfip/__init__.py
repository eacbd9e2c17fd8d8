"""Worst-case FIP, the package's own method: what the model is most susceptible to is searched for and unlearned."""

from fastfip.methods.wfip.config import FastWFIPConfig, WFIPConfig
from fastfip.methods.wfip.method import WFIP, FastWFIP

__all__ = ["WFIP", "FastWFIP", "FastWFIPConfig", "WFIPConfig"]
