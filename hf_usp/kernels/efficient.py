"""Memory-efficient attention (xFormers) in torch for CUDA: heads of any width, and float32.

Shape suffixes: T packed query rows, K packed key rows, H query heads, G kv heads, N query heads per kv head, D key
width, E value width.

The operator takes [B, L, H, D] with as many query as key heads: the n-th query heads of all kv heads make one call, so
keys are never repeated in memory. Mask type 2 is causal, aligned to the bottom right; a window limits keys on the left
there alone, and counts the diagonal. A limit `right` > 0 is causal for all rows but the last `right`, which see every
key to the end. If those have a limit on the left, too, another kernel computes them. The log-sum-exp of a call is
padded to multiples of 32 rows, by infinity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..compat import efficient_operators
from .base import Kernel, Request, Segments, Softmax
from .dialects import LANE
from .flash import operand, why_not_cuda
from .pieces import Gradients

FULL, CAUSAL = 0, 2
LSE_ROWS = 32


class _Call(NamedTuple):
    """Rows of one segment and its keys; `mask` and `window` of the operator, or the `segments` for the other kernel."""

    rows: slice
    keys: slice
    mask: int
    window: int | None
    segments: Segments | None


class EfficientKernel:
    """The operators are parameters for tests; `other` computes rows that are limited on the left alone."""

    name = "efficient"

    def __init__(self, other: Kernel, operators: tuple[Callable[..., Any], Callable[..., Any]] | None = None) -> None:
        self._other = other
        self._forward, self._backward = operators or efficient_operators()

    def why_not(self, request: Request) -> str | None:
        if request.device.type != "cuda":
            return f"it computes on CUDA devices, the tensors are on {request.device.type}"
        if request.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"torch's memory-efficient attention does not compute in {request.dtype}"
        if request.softmax.softcap is not None:
            return "torch's memory-efficient attention has no softcap; the packages of FlashAttention have"
        if (reason := why_not_cuda(request.device)) is not None:
            return reason
        major, minor = torch.cuda.get_device_capability(request.device)
        if major < 7 or (major < 8 and request.dtype == torch.bfloat16):
            return f"it does not compute in {request.dtype} on compute capability {major}.{minor}"
        return None

    def forward(
        self, q_THD: Tensor, k_KGD: Tensor, v_KGE: Tensor, segments: Segments, softmax: Softmax
    ) -> tuple[Tensor, Tensor]:
        out_THE = q_THD.new_empty(*q_THD.shape[:2], v_KGE.shape[2])
        lse_HT = q_THD.new_empty(q_THD.shape[1], len(q_THD), dtype=torch.float32)
        each = q_THD.shape[1] // k_KGD.shape[1]
        padded = _padded(q_THD, k_KGD, v_KGE)
        for call in _calls(segments):
            rows, keys = call.rows, call.keys
            if call.segments is not None:
                mine = q_THD[rows], k_KGD[keys], v_KGE[keys]
                out_THE[rows], lse_HT[:, rows] = self._other.forward(*mine, call.segments, softmax)
                continue
            q, k, v = padded[0][rows], padded[1][keys], padded[2][keys]
            plain = (None, None, None, len(q), len(k), 0.0, call.mask, True)
            for n in range(each):
                out, lse, *_ = self._forward(
                    q[None, :, n::each], k[None], v[None], *plain, scale=softmax.scale, window_size=call.window
                )
                out_THE[rows, n::each], lse_HT[n::each, rows] = out[0, ..., : v_KGE.shape[2]], lse[0, :, : len(q)]
        return out_THE, lse_HT

    def backward(
        self,
        dout_THE: Tensor,
        q_THD: Tensor,
        k_KGD: Tensor,
        v_KGE: Tensor,
        out_THE: Tensor,
        lse_HT: Tensor,
        segments: Segments,
        softmax: Softmax,
    ) -> Gradients:
        dq_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        # Several calls share keys: their gradients are summed in fp32.
        dk_KGD, dv_KGE = (torch.zeros_like(x, dtype=torch.float32) for x in (k_KGD, v_KGE))
        each = q_THD.shape[1] // k_KGD.shape[1]
        padded = _padded(q_THD, k_KGD, v_KGE), _padded(dout_THE, out_THE)
        for call in _calls(segments):
            rows, keys = call.rows, call.keys
            if call.segments is not None:
                given = dout_THE[rows], q_THD[rows], k_KGD[keys], v_KGE[keys], out_THE[rows], lse_HT[:, rows]
                dq_THD[rows], dk, dv = self._other.backward(*given, call.segments, softmax)
                dk_KGD[keys] += dk
                dv_KGE[keys] += dv
                continue
            (q, k, v), (dout, out) = padded
            for n in range(each):
                heads = rows, slice(n, None, each)
                mine = dout[heads], q[heads], k[keys], v[keys], out[heads].contiguous()
                dq, dk, dv = self._gradients(*mine, lse_HT[n::each, rows], call, softmax)
                dq_THD[heads] = dq[..., : q_THD.shape[2]]
                dk_KGD[keys] += dk[..., : k_KGD.shape[2]]
                dv_KGE[keys] += dv[..., : v_KGE.shape[2]]
        return dq_THD, dk_KGD.to(k_KGD.dtype), dv_KGE.to(v_KGE.dtype)

    def _gradients(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse_GT: Tensor,
        call: _Call,
        softmax: Softmax,
    ) -> Gradients:
        """The operator on one query head of each kv head."""
        lse = pad(lse_GT, (0, -len(q) % LSE_ROWS), value=float("inf")).contiguous()[None]
        unread = torch.zeros((), dtype=torch.int64, device=q.device)  # the random numbers of dropout
        rows = (dout[None], q[None], k[None], v[None], None, out[None], None, None, len(q), len(k))
        dq, dk, dv, _ = self._backward(
            *(*rows, lse, 0.0, unread, unread, call.mask, False),
            scale=softmax.scale,
            num_splits_key=1 if torch.are_deterministic_algorithms_enabled() else None,
            window_size=call.window,
        )
        return dq[0], dk[0], dv[0]


def _padded(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Rows that start at multiples of 16 bytes; each keeps its own width but for that."""
    return tuple(operand(x, -(-x.shape[2] // LANE) * LANE) for x in tensors)


def _calls(segments: Segments) -> Iterator[_Call]:
    """Every segment as one or two calls, whose rows do not overlap."""
    left, right = segments.window_size_left, segments.window_size_right
    for i, (q0, q1) in enumerate(zip(segments.q_offsets, segments.q_offsets[1:], strict=False)):
        keys = slice(segments.k_offsets[i], segments.k_offsets[i + 1])
        queries, length = q1 - q0, keys.stop - keys.start
        middle = q0 + (max(0, queries - right) if right >= 0 else 0)
        if middle > q0:  # shorter by `right` rows, so that the causal diagonal lies `right` further to the right
            window = left + right + 1 if 0 <= left + right < length and left >= 0 else None
            yield _Call(slice(q0, middle), keys, CAUSAL, window, None)
        if middle < q1:
            rest = None
            if 0 <= left < length - 1:  # the last row does not see the first key
                cu_seqlens_q = segments.cu_seqlens_q[i : i + 2] - segments.cu_seqlens_q[i]
                cu_seqlens_k = segments.cu_seqlens_k[i : i + 2] - segments.cu_seqlens_k[i]
                rest = Segments(
                    (0, q1 - middle), (0, length), left, -1, cu_seqlens_q.clamp(max=q1 - middle), cu_seqlens_k
                )
            yield _Call(slice(middle, q1), keys, FULL, None, rest)
