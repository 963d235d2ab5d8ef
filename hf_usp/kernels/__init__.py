"""Kernels that compute one tile of attention, and the choice between them."""

from .base import Kernel, Request, Segments, Softmax, accumulation_dtype
from .registry import KERNELS, Choice, check_installed, check_scores, choice_lines, choose_kernel, kernel_report

__all__ = [
    "KERNELS",
    "Choice",
    "Kernel",
    "Request",
    "Segments",
    "Softmax",
    "accumulation_dtype",
    "check_installed",
    "check_scores",
    "choice_lines",
    "choose_kernel",
    "kernel_report",
]
