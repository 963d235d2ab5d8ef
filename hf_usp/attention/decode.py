"""Attention of new tokens, which all ranks have, over keys of which each rank holds a part.

Each rank attends to the keys it holds, with a kernel. One message then brings the parts of all ranks to each of them,
and their log-sum-exps merge them: every rank merges the same numbers in the same order, so results are bitwise equal.

Shape suffixes: B rows, m new tokens of a row, n keys of a row on this rank, H query heads, G kv heads, D key width, E
value width, P ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed.comm import all_gather
from ..distributed.mesh import UspMesh
from ..kernels import Kernel, Segments, Softmax, accumulation_dtype
from ..sharding.intervals import IntArray
from ..sharding.tiles import cut_tiles


@dataclass(frozen=True, eq=False)
class DecodeTile:
    """New tokens of one row against keys of that row on this rank: one kernel call.

    Attributes:
        row: row of the batch.
        queries: its new tokens.
        keys: its keys on this rank.
        segments: the tile, as a kernel takes it.
    """

    row: int
    queries: slice
    keys: slice
    segments: Segments


def decode_tiles(visible: Sequence[tuple[IntArray, IntArray]], device: torch.device) -> list[DecodeTile]:
    """The tiles of a step.

    Args:
        visible: for each row of the batch the keys [lo, hi) of this rank that each new token sees, two arrays [m].
        device: of the data.
    """
    found = []
    for row, (lo, hi) in enumerate(visible):
        for q0, q1, k0, k1, left, right in zip(*(field.tolist() for field in cut_tiles(lo, hi)), strict=True):
            edges = (0, q1 - q0), (0, k1 - k0)
            on_device = (torch.tensor(e, dtype=torch.int32, device=device) for e in edges)
            found.append(DecodeTile(row, slice(q0, q1), slice(k0, k1), Segments(*edges, left, right, *on_device)))
    return found


def attend_to_held(
    q_BmHD: Tensor, k_BnGD: Tensor, v_BnGE: Tensor, tiles: Sequence[DecodeTile], softmax: Softmax, kernel: Kernel
) -> Tensor:
    """Output and log-sum-exp over this rank's keys [B, m, H, E + 1], in fp32 (fp64 for fp64).

    A token that sees no key here has output 0 and log-sum-exp -inf.
    """
    part = q_BmHD.new_zeros(
        *q_BmHD.shape[:3], v_BnGE.shape[3] + 1, dtype=accumulation_dtype(q_BmHD.dtype)
    )  # in one tensor, which is one message
    part[..., -1] = float("-inf")
    for tile in tiles:
        at = (tile.row, tile.queries)
        out, lse_Hm = kernel.forward(
            q_BmHD[at], k_BnGD[tile.row, tile.keys], v_BnGE[tile.row, tile.keys], tile.segments, softmax
        )
        part[at][..., :-1] = out
        part[at][..., -1] = lse_Hm.t()
    return part


def merge_over_ranks(part_BmHX: Tensor, sinks_H: Tensor | None, mesh: UspMesh) -> Tensor:
    """The softmax over the keys of all ranks [B, m, H, E], from every rank's `attend_to_held`; one message."""
    parts = part_BmHX[None] if mesh.group is None else all_gather(part_BmHX, mesh.group)
    out_PBmHE, lse_PBmH = parts[..., :-1], parts[..., -1]
    total_BmH = lse_PBmH.logsumexp(0)
    if sinks_H is not None:
        total_BmH = torch.logaddexp(total_BmH, sinks_H.to(total_BmH.dtype))
    weights = (lse_PBmH - total_BmH).exp()
    return (weights[..., None] * out_PBmHE).sum(0)
