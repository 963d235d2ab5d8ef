"""Attention in parts, put together by hand: two tiles, and all ranks of a ring in one process.

Shape suffixes: T packed query rows, K packed key rows, H query heads, G kv heads, D key width, E value width.

Independent of `hf_usp.ring`: only the integer plan and the kernel are the library's. Used on CPU and on a GPU.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_usp.kernels import Kernel, Softmax, accumulation_dtype
from hf_usp.layout import Mask, Tiles, deal
from hf_usp.plan import RingPlan, group_by_window, make_plan

from .cases import Data, Result


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """out_THE and lse_HT of the softmax over the keys of all parts (out, lse) of the same rows."""
    lse_HT = torch.stack([lse for _, lse in parts]).logsumexp(0)
    acc = accumulation_dtype(parts[0][0].dtype)
    out_THE = sum((lse - lse_HT).exp().T[..., None] * out.to(acc) for out, lse in parts)
    assert isinstance(out_THE, Tensor)
    return out_THE.to(parts[0][0].dtype), lse_HT


def virtual_ring(kernel: Kernel, data: Data, mask: Mask, order: str, ring: int, softmax: Softmax) -> Result:
    """What `ring` ranks compute together, rank by rank: forward, merge, then backward from the final statistics."""
    shards = deal(mask.documents.num_tokens, ring, order)
    q, k, v, dout = data
    acc = accumulation_dtype(q.dtype)
    out_THE, lse_HT = torch.zeros_like(dout), q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=acc)
    dq, dk, dv = (torch.zeros_like(x, dtype=acc) for x in (q, k, v))
    for rank in range(ring):
        plan, rows = make_plan(shards, mask, rank), _rows(shards[rank], q)
        mine = Data(q[rows], k, v, dout[rows])
        out, lse = _ring_forward(kernel, mine, plan, shards, softmax)
        out_THE[rows], lse_HT[:, rows] = out, lse
        _ring_backward(kernel, mine, plan, shards, softmax, (out, lse), (dq, dk, dv))
    return Result(out_THE, lse_HT, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype))


def _ring_forward(
    kernel: Kernel, mine: Data, plan: RingPlan, shards: list[np.ndarray], softmax: Softmax
) -> tuple[Tensor, Tensor]:
    acc = accumulation_dtype(mine.q.dtype)
    out_THE = torch.zeros_like(mine.dout, dtype=acc)
    lse_HT = mine.q.new_full((mine.q.shape[1], mine.q.shape[0]), float("-inf"), dtype=acc)
    for tiles, keys in _calls(plan, shards):
        rows, here = _tile_rows(tiles, keys, mine.q)
        part, part_lse = kernel.forward(mine.q[rows], mine.k[here], mine.v[here], _segments(tiles, mine.q), softmax)
        total = torch.logaddexp(lse_HT[:, rows], part_lse)
        shares = ((lse - total).exp().T[..., None] for lse in (lse_HT[:, rows], part_lse))
        out_THE[rows] = next(shares) * out_THE[rows] + next(shares) * part.to(acc)
        lse_HT[:, rows] = total
    return out_THE.to(mine.q.dtype), lse_HT


def _ring_backward(
    kernel: Kernel,
    mine: Data,
    plan: RingPlan,
    shards: list[np.ndarray],
    softmax: Softmax,
    final: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Adds this rank's gradients to the whole sequence's `grads`."""
    own = _rows(shards[plan.rank], mine.q)
    for tiles, keys in _calls(plan, shards):
        rows, here = _tile_rows(tiles, keys, mine.q)
        dq, dk, dv = kernel.backward(
            mine.dout[rows], mine.q[rows], mine.k[here], mine.v[here], final[0][rows], final[1][:, rows],
            _segments(tiles, mine.q), softmax,
        )  # fmt: skip
        for total, at, part in zip(grads, (own[rows], here, here), (dq, dk, dv), strict=True):
            total.index_add_(0, at, part.to(total.dtype))


def _calls(plan: RingPlan, shards: list[np.ndarray]) -> list[tuple[Tiles, np.ndarray]]:
    """Tiles of one kernel call each, with the global positions of the key rows that they count in."""
    calls = []
    for step in plan.steps:
        keys = shards[step.source]
        if step.source != plan.rank:
            reader_plan = make_plan(shards, _mask_of(plan), step.source) if False else None
            del reader_plan
        calls += [(tiles, keys) for tiles in group_by_window(step.tiles)]
    return calls
