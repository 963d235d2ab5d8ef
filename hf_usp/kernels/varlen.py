"""Arguments of FlashAttention 2's variable-length call, as torch's own build and the flash-attn package need them.

Shape suffixes: T packed query rows, K packed key rows, H query heads, G kv heads, D key width, E value width.

Both carry the same CUDA code, so both have its rules and its pitfalls (read in `flash_api.cpp` of flash-attn 2.7 to 2.8
and of torch 2.11 to 2.13):

- fp16 and bf16; key width = value width, a multiple of 8, at most 256: other widths are padded with zeros;
- rows are loaded 16 bytes at a time: starts and strides must be multiples of 8 elements, which nobody checks;
- the log-sum-exp [H, T] is read as dense memory, whatever its strides say, which nobody checks either;
- windows are aligned to the bottom right and grouped-query heads are native, as `Segments` has it;
- a window of `max_seqlen_k` or more counts as no limit, and next to a limit on the other side "no limit" becomes
  `max_seqlen_k`. Both are wrong where a segment has more queries than keys: its first rows lie lq - lk left of the
  diagonal. The lengths are only upper bounds for the launch, so `bounds` passes one that is large enough.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..compat import installed_version
from .base import Segments

MAX_WIDTH = 256
# Elements of two bytes in one 16-byte load.
LANE = 8


class Bounds(NamedTuple):
    """The host integers of one call.

    Attributes:
        max_seqlen_q: longest query segment.
        max_seqlen_k: longest key segment.
        causal: whether the kernel gets causal=True.
        left: window_size_left.
        right: window_size_right.
    """

    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool
    left: int
    right: int


def bounds(segments: Segments) -> Bounds:
    """Lengths and window under which the kernels compute exactly `segments`."""
    left, right = segments.window_size_left, segments.window_size_right
    max_seqlen_q, max_seqlen_k = segments.max_seqlen_q, segments.max_seqlen_k
    if left >= 0 or right >= 0:
        max_seqlen_k = max(max_seqlen_q, max_seqlen_k)
    # One query row a segment would take a path made for decoding (split keys, heads folded into rows): stay off it.
    return Bounds(max(2, max_seqlen_q), max_seqlen_k, left < 0 and right == 0, left, right)


def operands(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same rows and heads, zero-padded to one width that the kernels take, aligned; copied only where needed."""
    width = -(-max(x.shape[-1] for x in tensors) // LANE) * LANE
    return tuple(_aligned(x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1]))) for x in tensors)


def _aligned(x_LHD: Tensor) -> Tensor:
    *outer, last = x_LHD.stride()
    if last == 1 and x_LHD.storage_offset() % LANE == 0 and all(stride % LANE == 0 for stride in outer):
        return x_LHD
    return x_LHD.clone(memory_format=torch.contiguous_format)


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why FlashAttention 2 cannot compute such tensors, or None. Asks CUDA only about tensors on CUDA devices."""
    if device.type != "cuda":
        return f"it computes on CUDA devices, the tensors are on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention computes in float16 and bfloat16, not in {dtype}: train with bf16=True"
    if head_dim > MAX_WIDTH:
        return f"FlashAttention takes heads of at most {MAX_WIDTH}, not {head_dim}"
    if torch.version.hip is not None:
        return "it is not checked on ROCm, whose flash attention is another program"
    if not torch.cuda.is_available():
        return f"torch {installed_version('torch')} finds no CUDA device"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        found = ".".join(map(str, capability))
        return f"FlashAttention needs compute capability 8.0 (Ampere) or newer, this device has {found}"
    return None
