"""Kernels that compute one tile of attention, and the choice between them."""

from .base import Kernel, Segments, Softmax, accumulation_dtype
from .registry import KERNELS, check_installed, choose_kernel, kernel_report

__all__ = [
    "KERNELS",
    "Kernel",
    "Segments",
    "Softmax",
    "accumulation_dtype",
    "check_installed",
    "choose_kernel",
    "kernel_report",
]
