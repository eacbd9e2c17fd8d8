"""Backdoors of object detectors. One file each; a file that is here is found."""

from __future__ import annotations

from fastfip.attacks.detection.base import Annotation, DetectionAttack, get, names, register

__all__ = ["Annotation", "DetectionAttack", "get", "names", "register"]
