"""FlashAttention 2's variable-length call on the CPU: its checks, its host arithmetic, the dense definition.

Written from what `flash_api.cpp` does between its arguments and the launch (flash-attn 2.7 and 2.8, torch 2.11 to
2.13). What the real code checks raises; what it silently assumes (alignment, dense log-sum-exp, upper bounds that are
upper bounds) raises here as well, or is done to the memory as the real code would do it.

Shape suffixes: T packed query rows, K packed key rows, H query heads, G kv heads, D the common width.
"""

from __future__ import annotations

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
    left: int
    right: int
    softcap: float

    def check(self) -> None:
        rows = {"q": self.q, "k": self.k, "v": self.v}
        for name, x in rows.items():
            check_rows(name, x, self.q.dtype)
        assert self.q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only supports fp16 and bf16"
        width = self.q.shape[2]
        assert width % 8 == 0 and width <= 256, "head size is a multiple of 8 and at most 256"
        assert self.q.shape[1] % self.k.shape[1] == 0, "heads of keys divide heads of queries"
        assert self.k.shape == self.v.shape and self.k.shape[2] == width, "one width, and one shape of k and v"
        for cu, x, longest in (
            (self.cu_seqlens_q, self.q, self.max_seqlen_q),
            (self.cu_seqlens_k, self.k, self.max_seqlen_k),
        ):
            assert cu.dtype == torch.int32 and cu.ndim == 1 and cu.is_contiguous() and cu.device == x.device
            edges = cu.tolist()
            assert edges[0] == 0 and edges[-1] == len(x), "rows outside every segment would stay unwritten"
            assert longest >= max(b - a for a, b in pairwise(edges)), "rows beyond the maximum are never computed"
        assert len(self.cu_seqlens_q) == len(self.cu_seqlens_k)
        assert all(isinstance(x, int) for x in (self.max_seqlen_q, self.max_seqlen_k, self.left, self.right))

    @property
    def window(self) -> tuple[int, int]:
        """The window as the device sees it, after the host's clamps; (-1, -1) means no mask."""
        left, right = self.left, 0 if self.causal and self.max_seqlen_q > 1 else self.right
        left = -1 if left >= self.max_seqlen_k else left
        right = -1 if right >= self.max_seqlen_k else right
        if left < 0 and right > 0:
            left = self.max_seqlen_k
        if left >= 0 and right < 0:
            right = self.max_seqlen_k
        return left, right

    def segments(self) -> Segments:
        left, right = self.window
        edges_q, edges_k = tuple(self.cu_seqlens_q.tolist()), tuple(self.cu_seqlens_k.tolist())
        return Segments(edges_q, edges_k, left, right, self.cu_seqlens_q, self.cu_seqlens_k)

    @property
    def softmax(self) -> Softmax:
        return Softmax(self.scale, self.softcap or None)


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
    for name, x in (("dout", dout), ("out", out)):
        check_rows(name, x, call.q.dtype)
        assert x.shape == call.q.shape
    heads, rows = call.q.shape[1], call.q.shape[0]
    assert lse_HT.dtype == torch.float32 and lse_HT.shape == (heads, rows)
    # The kernel gets an address and reads dense rows from it.
    dense_HT = torch.as_strided(lse_HT, (heads, rows), (rows, 1), lse_HT.storage_offset())
    return EagerKernel().backward(dout, call.q, call.k, call.v, out, dense_HT, call.segments(), call.softmax)
