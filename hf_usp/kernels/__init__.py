"""Kernels that compute one tile of attention, and the choice between them."""

from .base import Kernel, Segments, Softmax, accumulation_dtype
from .choose import KERNELS, choose_kernel, kernel_report

__all__ = ["KERNELS", "Kernel", "Segments", "Softmax", "accumulation_dtype", "choose_kernel", "kernel_report"]
