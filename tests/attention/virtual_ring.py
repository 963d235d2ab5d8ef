"""Attention in parts, put together by hand: two tiles, and all ranks of a ring in one process.

Shape suffixes: T packed query rows, K packed key rows, H query heads, G kv heads, D key width, E value width.

Independent of `hf_usp.attention.ring`: only the integer plan and the kernel are the library's. Used on CPU and on a
GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_usp.kernels import Kernel, Segments, Softmax, accumulation_dtype
from hf_usp.sharding.load_balance import fixed_assignment
from hf_usp.sharding.masks import Mask
from hf_usp.sharding.schedule import make_ring_schedule
from hf_usp.sharding.tiles import group_by_window

from ..kernels.cases import Data, Result


class Piece(NamedTuple):
    """One kernel call of one rank: global rows of its queries and keys."""

    rows: Tensor
    keys: Tensor
    segments: Segments


def pieces(mask: Mask, order: str, ring: int, device: torch.device) -> Iterator[list[Piece]]:
    """The kernel calls of each rank. A key row is used only if its owner's plan sends it."""
    shards = fixed_assignment(mask.documents.num_tokens, ring, order)
    plans = [make_ring_schedule(shards, mask, rank) for rank in range(ring)]
    for rank, plan in enumerate(plans):
        calls = []
        for distance, step in enumerate(plan.steps):
            sent = plans[step.recv_rank].steps[distance].send_intervals
            arrived = (
                shards[rank]
                if distance == 0
                else np.concatenate([shards[step.recv_rank][a:b] for a, b in [*sent, (0, 0)]])
            )
            for tiles in group_by_window(step.tiles) if len(step.tiles.q0) else []:
                rows = np.concatenate([shards[rank][a:b] for a, b in zip(tiles.q0, tiles.q1, strict=True)])
                keys = np.concatenate([arrived[a:b] for a, b in zip(tiles.k0, tiles.k1, strict=True)])
                edges = [np.concatenate(([0], np.cumsum(n))) for n in (tiles.q1 - tiles.q0, tiles.k1 - tiles.k0)]
                cu_seqlens_q, cu_seqlens_k = (torch.tensor(e, dtype=torch.int32, device=device) for e in edges)
                window = int(tiles.left[0]), int(tiles.right[0])
                segments = Segments(
                    tuple(edges[0].tolist()), tuple(edges[1].tolist()), *window, cu_seqlens_q, cu_seqlens_k
                )
                calls.append(Piece(*(torch.from_numpy(x).to(device) for x in (rows, keys)), segments))
        yield calls


def virtual_ring(kernel: Kernel, data: Data, mask: Mask, order: str, ring: int, softmax: Softmax) -> Result:
    """The result of `ring` ranks together, rank by rank: forward, merge, then backward from the final statistics."""
    q, k, v, dout = data
    acc = accumulation_dtype(q.dtype)
    sums = torch.zeros_like(dout, dtype=acc)
    lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=acc)
    calls = [piece for rank in pieces(mask, order, ring, q.device) for piece in rank]
    for rows, keys, segments in calls:
        merge_(sums, lse, rows, *kernel.forward(q[rows], k[keys], v[keys], segments, softmax))
    out = sums.to(q.dtype)
    dq, dk, dv = (torch.zeros_like(x, dtype=acc) for x in (q, k, v))
    for rows, keys, segments in calls:
        # As the ring does it: the statistics are a slice of a larger tensor.
        final = out[rows], lse[:, rows]
        grads = kernel.backward(dout[rows], q[rows], k[keys], v[keys], *final, segments, softmax)
        for total, at, part in zip((dq, dk, dv), (rows, keys, keys), grads, strict=True):
            total.index_add_(0, at, part.to(acc))
    return Result(out, lse, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype))


def merge_(sums_THE: Tensor, lse_HT: Tensor, rows: Tensor | slice, out: Tensor, lse: Tensor) -> None:
    """Add the softmax over more keys to these rows, in place."""
    total = torch.logaddexp(lse_HT[:, rows], lse)
    old, new = ((part - total).exp().T[..., None] for part in (lse_HT[:, rows], lse))
    sums_THE[rows] = old * sums_THE[rows] + new * out.to(sums_THE.dtype)
    lse_HT[:, rows] = total


def two_tiles(kernel: Kernel, data: Data, split: int, softmax: Softmax) -> Result:
    """Full attention with the keys before and after `split` as two tiles."""
    q, k, v, dout = data
    everything, halves = slice(None), (slice(0, split), slice(split, len(k)))
    sums = torch.zeros_like(dout, dtype=accumulation_dtype(q.dtype))
    lse = sums.new_full((q.shape[1], q.shape[0]), float("-inf"))
    parts = [(half, _whole(len(q), len(k[half]), q.device)) for half in halves]
    for half, segments in parts:
        merge_(sums, lse, everything, *kernel.forward(q, k[half], v[half], segments, softmax))
    out = sums.to(q.dtype)
    grads = [kernel.backward(dout, q, k[half], v[half], out, lse, segments, softmax) for half, segments in parts]
    dq = sum(part[0].to(lse.dtype) for part in grads)
    assert isinstance(dq, Tensor)
    return Result(out, lse, dq.to(q.dtype), *(torch.cat([part[i] for part in grads]) for i in (1, 2)))


def _whole(queries: int, keys: int, device: torch.device) -> Segments:
    cu_seqlens_q, cu_seqlens_k = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (queries, keys))
    return Segments((0, queries), (0, keys), -1, -1, cu_seqlens_q, cu_seqlens_k)


def dense_mask(mask: Mask) -> Tensor:
    """The same mask [S, S] pair by pair."""
    bounds = mask.documents.bounds
    documents = torch.repeat_interleave(torch.arange(len(bounds) - 1), torch.from_numpy(np.diff(bounds)))
    position = torch.arange(len(documents))
    ahead = position - position[:, None]
    seen = documents[:, None] == documents
    if mask.left >= 0:
        seen &= ahead >= -mask.left
    if mask.right >= 0:
        seen &= ahead <= mask.right
    return seen
