"""The choice of a kernel: the first that can compute a call, or the one that the user names."""

from __future__ import annotations

import warnings

import torch

from ..errors import UspKernelError
from .base import Kernel, Softmax
from .cpu_flash import CpuFlashKernel
from .cuda_flash import CudaFlashKernel
from .eager import EagerKernel
from .flash_attn import FlashAttnKernel

# In order of preference. `eager` computes everything and comes last.
_IN_ORDER: tuple[Kernel, ...] = (FlashAttnKernel(), CudaFlashKernel(), CpuFlashKernel(), EagerKernel())
KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in _IN_ORDER}


def choose_kernel(
    device: torch.device, dtype: torch.dtype, head_dim: int, softmax: Softmax, name: str | None = None
) -> Kernel:
    """The kernel for such a call. `head_dim` is the larger of key and value width.

    With `name` that kernel or a `UspKernelError` that says why it cannot; a call is never computed by another kernel
    than the one that was asked for.
    """
    if name is None:
        kernel = next(k for k in KERNELS.values() if k.why_not(device, dtype, head_dim, softmax) is None)
        if kernel.name == EagerKernel.name and device.type != "cpu":
            _warn_of_eager(device, dtype, head_dim, softmax)
        return kernel
    if not isinstance(name, str) or name not in KERNELS:
        raise UspKernelError(
            f"kernel={name!r}",
            rule=f"a kernel is one of {', '.join(KERNELS)}",
            remedy="leave kernel=None to let hf_usp choose",
        )
    if (reason := KERNELS[name].why_not(device, dtype, head_dim, softmax)) is not None:
        raise UspKernelError(
            f"kernel={name!r} cannot compute {dtype} attention of head width {head_dim} on {device.type}: {reason}",
            rule="a kernel that is asked for by name is used or refused, never replaced",
            remedy="leave kernel=None to let hf_usp choose, or name another of " + ", ".join(KERNELS),
        )
    return KERNELS[name]


def _warn_of_eager(device: torch.device, dtype: torch.dtype, head_dim: int, softmax: Softmax) -> None:
    """Scores of 1,024 queries and all keys lie in memory, where flash attention has none. Python says it once."""
    reasons = [f"{name}: {why}" for name, why in kernel_report(device, dtype, head_dim, softmax) if why]
    warnings.warn(
        f"usp: no flash attention for {dtype} heads of width {head_dim} on {device.type}, the slow kernel 'eager' "
        f"computes instead ({'; '.join(reasons)})",
        stacklevel=2,
    )


def check_installed(name: str | None, device: torch.device) -> None:
    """Refuse a kernel that has no such name, or that this machine cannot run in any dtype; `UspKernelError`.

    A batch on the CPU may still be on its way to where it is computed: there the name alone is looked at.
    """
    if name is None:
        return
    softmax, dtypes = Softmax(1.0), (torch.bfloat16, torch.float32)
    unknown = not isinstance(name, str) or name not in KERNELS
    if device.type == "cpu" and not unknown:
        return
    if unknown or all(KERNELS[name].why_not(device, dtype, 8, softmax) for dtype in dtypes):
        choose_kernel(device, dtypes[0], 8, softmax, name)  # says why


def kernel_report(
    device: torch.device, dtype: torch.dtype, head_dim: int, softmax: Softmax
) -> list[tuple[str, str | None]]:
    """(name, why not) of every kernel for such a call, in order of preference; the first None is the one chosen."""
    return [(k.name, k.why_not(device, dtype, head_dim, softmax)) for k in KERNELS.values()]
