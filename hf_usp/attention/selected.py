"""Attention of local queries to the few keys that each of them has selected, a chunk of queries at a time.

All keys of a row are here (`batch.unshard` gathers them), the queries are this rank's. A chunk gathers its keys,
[B, G, C, K, D], and computes what K keys cost. Nothing of a chunk outlives it: the backward computes it again.

Shape suffixes: B rows, L tokens of a row on this rank, S tokens of a row, C queries of a chunk, H query heads, G kv
heads, D key width, E value width, K selected keys, X: 1 or G.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import accumulation_dtype
from ..utils.autograd import forbid_double_backward

# Numbers in the largest tensor of a chunk: 256 MiB in fp32.
CHUNK_NUMBERS = 2**26


@dataclass(frozen=True, eq=False)
class Selection:
    """The keys that local queries have selected, and the interval of keys that each of them may see.

    Attributes:
        index: tokens of a row [B, X, L, K], for all kv heads or each of them; -1 for none.
        first: the first key of its row that each query sees [B, L].
        last: the key after the last one that it sees [B, L].
    """

    index: Tensor
    first: Tensor
    last: Tensor

    def rows(self, a: int, b: int, kv_heads: int, length: int) -> tuple[Tensor, Tensor]:
        """Of the queries a .. b - 1: rows of keys flattened to [B * G * S], and which of them they see [B, G, C, K]."""
        index = self.index[:, :, a:b].long()
        seen = (index >= self.first[:, None, a:b, None].clamp_min(0)) & (index < self.last[:, None, a:b, None])
        batch = len(index)
        start = torch.arange(batch * kv_heads, device=index.device).view(batch, kv_heads, 1, 1) * length
        return index.clamp_min(0) + start, seen.expand(-1, kv_heads, -1, -1)


def marked_keys(seen: Tensor, most: int | None = None) -> Tensor:
    """A boolean selection [..., S] as numbers of keys [..., K], -1 where a query has selected fewer than another.

    most: no query has selected more; None: they are counted, for which the host waits.
    """
    most = max(int(seen.sum(-1).max()), 1) if most is None else most
    marks, index = seen.to(torch.int8).topk(min(most, seen.shape[-1]), dim=-1)
    return index.masked_fill(marks == 0, -1)


def queries_per_chunk(numbers: int, length: int) -> int:
    """Queries that a chunk takes of `length`, where each of them needs a tensor of so many numbers."""
    return max(1, min(length, CHUNK_NUMBERS // max(numbers, 1)))


def attend_to_selected(
    q: Tensor, k: Tensor, v: Tensor | int, sinks: Tensor | None, selection: Selection, scale: float
) -> Tensor:
    """Softmax attention over the selected keys that a query sees. Differentiable.

    Args:
        q: local queries [B, H, L, D].
        k: keys of all tokens [B, G, S, D].
        v: values of all tokens [B, G, S, E]; a number E: they are the first E entries of the keys (latents).
        sinks: one extra score per query head [H] that only joins the normaliser.
        selection: what each query has selected and sees.
        scale: factor of the scores.

    Returns:
        [B, H, L, E]. Rows that see no key are zero.
    """
    values, width = (None, v) if isinstance(v, int) else (v, v.shape[-1])
    out: Tensor = _SelectedAttention.apply(q, k, values, sinks, selection, scale, width)
    return out


class _SelectedAttention(torch.autograd.Function):
    """Only the inputs are kept for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        sinks: Tensor | None,
        selection: Selection,
        scale: float,
        width: int,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, sinks, selection.index, selection.first, selection.last)
        ctx.scale, ctx.width = scale, width
        out = q.new_empty(*q.shape[:3], width)
        for a, b in _chunks(q, k, selection):
            out[:, :, a:b] = _Chunk(q, k, v, sinks, selection, scale, width, a, b).output()
        return out

    @staticmethod
    @forbid_double_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, *indices = ctx.saved_tensors
        selection = Selection(*indices)
        wide = accumulation_dtype(k.dtype)
        dq, dk = torch.empty_like(q), torch.zeros_like(k, dtype=wide).flatten(0, 2)
        dv = None if v is None else torch.zeros_like(v, dtype=wide).flatten(0, 2)
        dsinks = None if sinks is None else torch.zeros_like(sinks, dtype=accumulation_dtype(sinks.dtype))
        for a, b in _chunks(q, k, selection):
            chunk = _Chunk(q, k, v, sinks, selection, ctx.scale, ctx.width, a, b)
            dq[:, :, a:b], of_sinks = chunk.gradients(grads[0][:, :, a:b], dk, dv)
            if dsinks is not None and of_sinks is not None:
                dsinks += of_sinks
        grad_v = None if v is None or dv is None else dv.view(v.shape).to(v.dtype)
        grad_sinks = None if sinks is None or dsinks is None else dsinks.to(sinks.dtype)
        return dq, dk.view(k.shape).to(k.dtype), grad_v, grad_sinks, None, None, None


def _chunks(q: Tensor, k: Tensor, selection: Selection) -> list[tuple[int, int]]:
    batch, heads, length, width = q.shape
    selected = selection.index.shape[-1]
    step = queries_per_chunk(batch * selected * max(k.shape[1] * width, heads), length)
    return [(a, min(a + step, length)) for a in range(0, length, step)]


class _Chunk:
    """The queries a .. b - 1: their keys and their weights p [B, G, C, H / G, K], which sinks may have reduced."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        sinks: Tensor | None,
        selection: Selection,
        scale: float,
        width: int,
        a: int,
        b: int,
    ) -> None:
        batch, groups, length, _ = k.shape
        self.scale, self.width, self.latents = scale, width, v is None
        rows, seen = selection.rows(a, b, groups, length)
        self.rows, shape = rows.flatten(), rows.shape
        self.k = k.flatten(0, 2)[self.rows].view(*shape, -1)
        self.v = self.k[..., :width] if v is None else v.flatten(0, 2)[self.rows].view(*shape, -1)
        self.q = q[:, :, a:b].unflatten(1, (groups, -1)).transpose(2, 3)
        s = (self.q @ self.k.mT).to(accumulation_dtype(q.dtype)) * scale
        s = s.masked_fill(~seen[:, :, :, None], -torch.inf)
        lse = s.logsumexp(-1, keepdim=True)
        self.p_sink: Tensor | None = None
        if sinks is not None:
            sinks = sinks.to(s.dtype).view(1, groups, 1, -1, 1)
            lse = torch.logaddexp(lse, sinks)
            self.p_sink = (sinks - lse).exp()
        self.p = torch.nan_to_num((s - lse).exp()) if sinks is None else (s - lse).exp()

    def output(self) -> Tensor:
        """[B, H, C, E]"""
        return (self.p.to(self.v.dtype) @ self.v).transpose(2, 3).flatten(1, 2)

    def gradients(self, grad: Tensor, dk: Tensor, dv: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Gradients of queries [B, H, C, D] and sinks [H]; those of keys and values are added to dk, dv [B * G * S]."""
        grad = grad.unflatten(1, (self.k.shape[1], -1)).transpose(2, 3)
        dp = (grad @ self.v.mT).to(self.p.dtype)
        delta = (self.p * dp).sum(-1, keepdim=True)
        ds = (self.p * (dp - delta) * self.scale).to(self.q.dtype)
        of_keys = (ds.mT @ self.q).to(dk.dtype)
        of_values = (self.p.to(grad.dtype).mT @ grad).to(dk.dtype)
        if dv is None:
            of_keys[..., : self.width] += of_values
        else:
            dv.index_add_(0, self.rows, of_values.flatten(0, -2))
        dk.index_add_(0, self.rows, of_keys.flatten(0, -2))
        dsinks = None if self.p_sink is None else (-self.p_sink * delta).sum((0, 2)).flatten()
        return (ds @ self.k).transpose(2, 3).flatten(1, 2), dsinks
