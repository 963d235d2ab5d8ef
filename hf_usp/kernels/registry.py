"""The choice of a kernel: the first that can compute a call, or the one that the user names.

The order is that of the rates that are known for a device (docs/decisions/0025-which-kernel-computes.md).
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch

from ..errors import UspKernelError
from .base import Kernel, Request, Softmax, accumulation_dtype
from .blockwise import BlockwiseKernel
from .cpu_flash import CpuFlashKernel
from .cudnn import CudnnKernel
from .dialects import active_implementation
from .eager import ROWS, EagerKernel
from .efficient import EfficientKernel
from .flash import FLASH_KERNELS

_BLOCKWISE = BlockwiseKernel()
# `eager`, the definition, computes everything and is used where it is named.
KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        *FLASH_KERNELS,
        CudnnKernel(FLASH_KERNELS[:2]),
        EfficientKernel(_BLOCKWISE),
        CpuFlashKernel(),
        _BLOCKWISE,
        EagerKernel(),
    )
}
_FLASH_2 = ("flash_attn", "cuda_flash", "efficient", "blockwise", "eager")
_ELSEWHERE = ("cpu_flash", "blockwise", "eager")
# By the major number of the compute capability.
_IN_ORDER = {9: ("fa3", "cudnn", "fa4", *_FLASH_2), 10: ("fa4", "cudnn", *_FLASH_2)}
# Kernels without a matrix of scores in memory, at the rate of their device.
_SLOW = ("blockwise", "eager")
# Bytes of scores that `eager` may keep at a time; its backward keeps about four times as many.
MOST_SCORES = 2**32


class Choice(NamedTuple):
    """A kernel that is offered for a call.

    Attributes:
        name: its name, and what it stands for at the moment.
        why_not: why it cannot compute the call; None where it can.
        faster: whether it would come before the chosen one, and its package is all that is missing.
    """

    name: str
    why_not: str | None
    faster: bool = False


def order(device: torch.device) -> tuple[str, ...]:
    """Names of kernels for a device, the preferred first; those that are never chosen there are left out.

    What somebody activated in torch comes first: that is a wish, too.
    """
    if device.type != "cuda":
        return _ELSEWHERE
    major = torch.cuda.get_device_capability(device)[0] if torch.cuda.is_available() else 0
    names = _IN_ORDER.get(major, _FLASH_2)
    if active_implementation() is not None:
        names = ("cuda_flash", *(name for name in names if name != "cuda_flash"))
    return names


def choose_kernel(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    softmax: Softmax,
    name: str | None = None,
    value_dim: int | None = None,
) -> Kernel:
    """The kernel for such a call; `value_dim` is the key width `head_dim` where it is left out.

    With `name` that kernel or a `UspKernelError` that says why it cannot; a call is never computed by another kernel
    than the one that was asked for.
    """
    request = Request(device, dtype, head_dim, value_dim or head_dim, softmax, named=name is not None)
    if name is None:
        _check_activation(device)
        kernel = next(KERNELS[n] for n in order(device) if KERNELS[n].why_not(request) is None)
        if kernel.name in _SLOW and device.type != "cpu":
            _warn_of_slow(kernel, request)
        return kernel
    if not isinstance(name, str) or name not in KERNELS:
        raise UspKernelError(
            f"kernel={name!r}",
            rule=f"a kernel is one of {', '.join(KERNELS)}",
            remedy="leave kernel=None to let hf_usp choose",
        )
    if (reason := KERNELS[name].why_not(request)) is not None:
        raise UspKernelError(
            f"kernel={name!r} cannot compute {dtype} attention of head width {request.widths} on {device.type}: "
            f"{reason}",
            rule="a kernel that is asked for by name is used or refused, never replaced",
            remedy="leave kernel=None to let hf_usp choose, or name another of " + ", ".join(KERNELS),
        )
    return KERNELS[name]


def check_scores(kernel: Kernel, heads: int, queries: int, keys: int, dtype: torch.dtype) -> None:
    """Refuse calls whose scores `eager` cannot keep in memory; `UspKernelError`."""
    if kernel.name != EagerKernel.name:
        return
    scores = heads * min(ROWS, queries) * keys * torch.finfo(accumulation_dtype(dtype)).bits // 8
    if scores > MOST_SCORES:
        raise UspKernelError(
            f"kernel='eager' for {heads} heads and {keys:,} keys: {scores / 2**30:.0f} GiB of scores at a time",
            rule=f"eager, the definition, keeps the scores of up to {ROWS:,} queries and all keys, at most "
            f"{MOST_SCORES / 2**30:.0f} GiB",
            remedy="name kernel='blockwise', which computes the same in blocks, or leave kernel=None",
        )


def _check_activation(device: torch.device) -> None:
    """Refuse an implementation that was activated in torch and that torch itself would refuse in the first call."""
    found = active_implementation() if device.type == "cuda" else None
    if found is None:
        return
    reason = KERNELS["cuda_flash"].why_not(Request(device, torch.bfloat16, 64, 64, Softmax(1.0)))
    if reason is not None:
        raise UspKernelError(
            f"torch.nn.attention.activate_flash_attention_impl({found!r}) was called, but {reason}",
            rule="an implementation that was activated is used or refused, never replaced",
            remedy="call torch.nn.attention.restore_flash_attention_impl() to let hf_usp choose",
        )


def _warn_of_slow(kernel: Kernel, request: Request) -> None:
    """Plain matrix products, where flash attention has one kernel. Python says it once."""
    reasons = [f"{name}: {KERNELS[name].why_not(request)}" for name in order(request.device) if name not in _SLOW]
    warnings.warn(
        f"usp: no flash attention for {request.dtype} heads of width {request.widths} on {request.device.type}, the "
        f"slow kernel {kernel.name!r} computes instead ({'; '.join(reasons)})",
        stacklevel=3,
    )


def check_installed(name: str | None, device: torch.device) -> None:
    """Refuse a kernel that has no such name, or that this machine cannot run in any dtype; `UspKernelError`.

    The same for an implementation that was activated in torch. A batch on the CPU may still be on its way to where it
    is computed: there the name alone is looked at.
    """
    if name is None:
        _check_activation(device)
        return
    unknown = not isinstance(name, str) or name not in KERNELS
    if device.type == "cpu" and not unknown:
        return
    softmax, dtypes = Softmax(1.0), (torch.bfloat16, torch.float32)
    if unknown or all(KERNELS[name].why_not(Request(device, dtype, 8, 8, softmax, named=True)) for dtype in dtypes):
        choose_kernel(device, dtypes[0], 8, softmax, name)  # says why


def kernel_report(request: Request) -> list[Choice]:
    """Every kernel for such a call, in order of preference; the first without a reason is the one chosen."""
    listed = [(n, KERNELS[n].why_not(request)) for n in dict.fromkeys((*order(request.device), *KERNELS))]
    chosen = next(i for i, (_, why_not) in enumerate(listed) if why_not is None)
    active = active_implementation()
    return [
        Choice(
            f"{name} (torch's {active})" if name == "cuda_flash" and active else name,
            why_not,
            faster=i < chosen and why_not is not None and ": pip install" in why_not,
        )
        for i, (name, why_not) in enumerate(listed)
    ]


def choice_lines(choices: list[Choice]) -> list[str]:
    """The kernel that is chosen, and why none of those before it in the order."""
    chosen = next(i for i, choice in enumerate(choices) if choice.why_not is None)
    lines = [choices[chosen].name + (", the first choice on this device" if chosen == 0 else "")]
    for name, why_not, faster in choices[:chosen]:
        lines.append(f"not {name}{', which would be faster' if faster else ''}: {why_not}")
    return lines
