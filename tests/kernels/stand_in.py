"""A variable-length call of FlashAttention 2, 3 or 4 on the CPU: its checks, its host arithmetic, the definition.

Written from what the real code does between its arguments and the launch: `flash_api.cpp` of flash-attn 2.7 and 2.8 and
of torch 2.11 to 2.13, `hopper/flash_api.cpp`, `flash_attn/cute/interface.py` of flash-attn-4 4.0.0b30 and b36. A
violated check raises. Its silent assumptions (alignment, dense log-sum-exp, upper bounds that are upper bounds) raise
here as well, or one is done to the memory as the real code would do it.

Shape suffixes: T packed query rows, K packed key rows, H query heads, G kv heads, D the common width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hf_usp.kernels import Segments, Softmax
from hf_usp.kernels.eager import EagerKernel


@dataclass(frozen=True)
class Varlen:
    """The arguments of one call by their meaning."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    scale: float
    causal: bool
    left: int | None
    right: int | None
    softcap: float
    family: str = "fa2"
    major: int = 9

    def check(self) -> None:
        rows = {"q": self.q, "k": self.k, "v": self.v}
        for name, x in rows.items():
            check_rows(name, x, self.q.dtype)
        assert self.q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only supports fp16 and bf16"
        assert self.q.shape[1] % self.k.shape[1] == 0, "heads of keys divide heads of queries"
        assert self.k.shape[:2] == self.v.shape[:2] and self.k.shape[2] == self.q.shape[2]
        check_widths(self.family, self.major, self.k.shape[2], self.v.shape[2])
        for cu, x, longest in (
            (self.cu_seqlens_q, self.q, self.max_seqlen_q),
            (self.cu_seqlens_k, self.k, self.max_seqlen_k),
        ):
            assert cu.dtype == torch.int32 and cu.ndim == 1 and cu.is_contiguous() and cu.device == x.device
            edges = cu.tolist()
            assert edges[0] == 0 and edges[-1] == len(x), "rows outside every segment would stay unwritten"
            assert longest >= max(b - a for a, b in pairwise(edges)), "rows beyond the maximum are never computed"
        assert len(self.cu_seqlens_q) == len(self.cu_seqlens_k)
        assert all(type(x) is int for x in (self.max_seqlen_q, self.max_seqlen_k))
        assert all(type(x) is int or (x is None and self.family == "fa4") for x in (self.left, self.right))

    @property
    def window(self) -> tuple[int, int]:
        """The window as the device sees it, after the host's clamps; (-1, -1) means no mask."""
        return WINDOWS_OF[self.family](self.causal, self.left, self.right, self.max_seqlen_q, self.max_seqlen_k)

    def segments(self) -> Segments:
        left, right = self.window
        edges_q, edges_k = tuple(self.cu_seqlens_q.tolist()), tuple(self.cu_seqlens_k.tolist())
        return Segments(edges_q, edges_k, left, right, self.cu_seqlens_q, self.cu_seqlens_k)

    @property
    def softmax(self) -> Softmax:
        return Softmax(self.scale, self.softcap or None)


def fa2_window(causal: bool, left: int, right: int, max_q: int, max_k: int) -> tuple[int, int]:
    """`mha_varlen_fwd` of flash-attn 2."""
    right = 0 if causal and max_q > 1 else right
    left, right = -1 if left >= max_k else left, -1 if right >= max_k else right
    return max_k if left < 0 < right else left, max_k if left >= 0 > right else right


def fa3_window(causal: bool, left: int, right: int, max_q: int, max_k: int) -> tuple[int, int]:
    """`mha_fwd` and `set_params_fprop` of hopper/flash_api.cpp."""
    left, right = -1 if left >= max_k - 1 else left, -1 if right >= max_q - 1 else right
    causal = causal and max_q > 1
    right = 0 if causal else right
    if (left < 0 and right == 0) or (left < 0 and right < 0):
        return left, right
    return max_k - 1 if left < 0 else left, max_q - 1 if right < 0 else right


def fa4_window(causal: bool, left: int | None, right: int | None, max_q: int, max_k: int) -> tuple[int, int]:
    """`_resolve_causal_local_window`; a single negative number is a bound, on the other side of the diagonal."""
    if left is not None and right is not None and left < 0 and right < 0:
        left = right = None
    right = 0 if causal else right
    assert all(side is None or side >= 0 for side in (left, right)), "a negative bound hides keys that are to be seen"
    return -1 if left is None else left, -1 if right is None else right


WINDOWS_OF: dict[str, Callable[..., tuple[int, int]]] = {"fa2": fa2_window, "fa3": fa3_window, "fa4": fa4_window}


def check_widths(family: str, major: int, width: int, value_width: int) -> None:
    """`_validate_head_dims` of FA4, and what the others check of head sizes."""
    assert width % 8 == 0 and value_width % 8 == 0 and max(width, value_width) <= 256, "a multiple of 8, at most 256"
    if family == "fa2":
        assert width == value_width, "one width, and one shape of k and v"
    elif family == "fa3":
        two = 128 < width <= 192 and 96 < value_width <= 128
        assert width == value_width or two or width <= 64, "FA3 has no such value width"
    elif major >= 10:
        standard = max(width, value_width) <= 128
        assert standard or (width, value_width) in ((192, 128), (256, 256)), f"{width}, {value_width} on SM100"
        assert (width, value_width) != (256, 256), "no window in the backward, wrong results in some releases"
        assert width < 128 or value_width % 64 == 0, "`(E / 2) % gcd(32, D / 2)` in the backward"


def check_rows(name: str, x: Tensor, dtype: torch.dtype) -> None:
    assert x.ndim == 3 and x.dtype == dtype, f"{name}: three dimensions, one dtype"
    assert x.stride(2) == 1, f"{name}: contiguous last dimension"
    aligned = x.storage_offset() % 8 == 0 and all(stride % 8 == 0 for stride in x.stride()[:2])
    assert aligned, f"{name}: a 16-byte load from an address that is no multiple of 16 ends the process"


def forward(call: Varlen) -> tuple[Tensor, Tensor]:
    call.check()
    assert not (call.max_seqlen_q == 1 and call.q.shape[1] > call.k.shape[1]), "the path made for decoding"
    return EagerKernel().forward(call.q, call.k, call.v, call.segments(), call.softmax)


def backward(call: Varlen, dout: Tensor, out: Tensor, lse_HT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    call.check()
    heads, rows, value_width = call.q.shape[1], call.q.shape[0], call.v.shape[2]
    for name, x in (("dout", dout), ("out", out)):
        check_rows(name, x, call.q.dtype)
        assert x.shape == (rows, heads, value_width)
    assert lse_HT.dtype == torch.float32 and lse_HT.shape == (heads, rows)
    # The kernel gets an address and reads dense rows from it.
    dense_HT = torch.as_strided(lse_HT, (heads, rows), (rows, 1), lse_HT.storage_offset())
    return EagerKernel().backward(dout, call.q, call.k, call.v, out, dense_HT, call.segments(), call.softmax)
