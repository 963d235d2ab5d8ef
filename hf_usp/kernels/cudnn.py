"""Attention by cuDNN, which CUDA builds of torch carry: dense squares and rectangles; the rest by FlashAttention 2.

Shape suffixes: T packed query rows, K packed key rows, H query heads, G kv heads, D key width, E value width.

The operator takes [B, H, L, D] views, grouped-query heads natively, and any final log-sum-exp. Its `is_causal` is
aligned to the TOP LEFT, so it is used only on squares. It has no window and no softcap. It plans each new shape for a
tenth of a second and more, once in the thread of the forward and once in that of the backward (predicted). Lengths of
fixed rows repeat and are multiples of 128 as a rule; those of documents are new in every batch. So it takes segments
of at least 1,024 keys whose lengths are such multiples, and any others from 32,768 on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..compat import cudnn_operators
from .base import Kernel, Request, Segments, Softmax
from .dialects import LANE
from .flash import operand, why_not_cuda
from .pieces import Gradients, Piece, cut, join_gradients, join_outputs

LEAST, WORTH_A_PLAN, UNIT = 1024, 32_768, 128


class CudnnKernel:
    """cuDNN where it computes a segment, else one of `others`; the operators are parameters for tests."""

    name = "cudnn"

    def __init__(
        self, others: tuple[Kernel, ...], operators: tuple[Callable[..., Any], Callable[..., Any]] | None = None
    ) -> None:
        self.others, self._other = others, others[0]
        self._forward, self._backward = operators or cudnn_operators()

    def why_not(self, request: Request) -> str | None:
        widest = max(request.head_dim, request.value_dim)
        if request.device.type != "cuda":
            return f"it computes on CUDA devices, the tensors are on {request.device.type}"
        if request.dtype not in (torch.float16, torch.bfloat16):
            return f"cuDNN computes attention in float16 and bfloat16, not in {request.dtype}: train with bf16=True"
        if widest > 256:
            return f"cuDNN takes heads of at most 256, not {widest}"
        if request.softmax.softcap is not None:
            return "cuDNN has no softcap; the packages of FlashAttention have"
        if torch.are_deterministic_algorithms_enabled():
            return "torch cannot make cuDNN's backward deterministic"
        if (reason := _why_not_here(request, widest)) is not None:
            return reason
        unnamed = replace(request, named=False)  # nobody asked for the others: none is downloaded
        reasons = [(other, other.why_not(unnamed)) for other in self.others]
        self._other = next((other for other, reason in reasons if reason is None), self.others[0])
        if all(reason is not None for _, reason in reasons):
            return f"nothing computes its other segments ({'; '.join(f'{k.name}: {why}' for k, why in reasons)})"
        return None

    def forward(
        self, q_THD: Tensor, k_KGD: Tensor, v_KGE: Tensor, segments: Segments, softmax: Softmax
    ) -> tuple[Tensor, Tensor]:
        pieces = _pieces(segments)

        def compute(piece: Piece) -> tuple[Tensor, Tensor]:
            q, k, v = q_THD[piece.rows], k_KGD[piece.keys], v_KGE[piece.keys]
            if not piece.own:
                return self._other.forward(q, k, v, piece.segments, softmax)
            causal = piece.segments.window_size_right == 0
            out, lse, *_ = self._forward(*map(_dense, (q, k, v)), None, True, 0.0, causal, False, scale=softmax.scale)
            return out[0, ..., : v.shape[2]].transpose(0, 1), lse.reshape(q.shape[1], len(q))

        return join_outputs(pieces, compute, len(q_THD))

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
        def compute(piece: Piece) -> Gradients:
            rows, keys = piece.rows, piece.keys
            dout, q, k, v, out = dout_THE[rows], q_THD[rows], k_KGD[keys], v_KGE[keys], out_THE[rows]
            lse = lse_HT[:, rows]
            if not piece.own:
                return self._other.backward(dout, q, k, v, out, lse, piece.segments, softmax)
            unread = torch.zeros((), dtype=torch.int64, device=q.device)  # the random numbers of dropout
            tensors = (*map(_dense, (dout, q, k, v, out)), lse.contiguous()[None, ..., None], unread, unread)
            lengths = (None, None, None, len(q), len(k))  # no bias, no offsets
            causal = piece.segments.window_size_right == 0
            grads = self._backward(*tensors, *lengths, 0.0, causal, scale=softmax.scale)
            dq, dk, dv = (grad[0, ..., : x.shape[2]].transpose(0, 1) for grad, x in zip(grads, (q, k, v), strict=True))
            return dq, dk, dv

        return join_gradients(_pieces(segments), compute, (q_THD, k_KGD, v_KGE))


def _pieces(segments: Segments) -> list[Piece]:
    left, right = segments.window_size_left, segments.window_size_right

    def takes(queries: int, keys: int) -> bool:
        lengths = sorted((queries, keys))
        repeats = lengths[1] >= LEAST and queries % UNIT == 0 and keys % UNIT == 0
        square = right < 0 or (right == 0 and queries == keys)
        return left < 0 and square and (repeats or lengths[0] >= WORTH_A_PLAN)

    return list(cut(segments, takes))


def _dense(x_LHD: Tensor) -> Tensor:
    """[1, H, L, D], a view where rows are aligned."""
    return operand(x_LHD, -(-x_LHD.shape[2] // LANE) * LANE).transpose(0, 1)[None]


def _why_not_here(request: Request, widest: int) -> str | None:
    if (reason := why_not_cuda(request.device)) is not None:
        return reason
    if not torch.backends.cudnn.is_available() or (torch.backends.cudnn.version() or 0) < 90_000:
        return "this torch has no cuDNN 9: install a build of torch that has it"
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return "torch.backends.cuda.enable_cudnn_sdp(False) was called"
    major, minor = torch.cuda.get_device_capability(request.device)
    if major < 8:
        return f"cuDNN's attention needs compute capability 8.0 (Ampere) or newer, this device has {major}.{minor}"
    latent = major in (9, 10) and request.head_dim <= 192 and request.value_dim <= 128
    if widest > 128 and major != 9 and not latent:
        return f"cuDNN has no backward for heads of width {request.widths} on compute capability {major}.{minor}"
    return None
