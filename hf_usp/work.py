"""A plan made ready for one device: indices and segment edges as tensors, once per batch and mask.

No layer plans, and none copies integers to the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .kernels import Segments
from .layout import IntArray, Tiles
from .plan import RingPlan, group_by_window

Index = slice | Tensor


@dataclass(frozen=True, eq=False)
class Call:
    """One kernel call: the query rows and key rows it gathers, and its segments."""

    rows: Index
    keys: Index
    keys_distinct: bool
    segments: Segments


@dataclass(frozen=True, eq=False)
class Stage:
    """One step of the ring on this device; `source` and `reader` are ring ranks."""

    source: int
    reader: int
    send: Index
    num_sent: int
    num_received: int
    calls: tuple[Call, ...]


@dataclass(frozen=True, eq=False)
class Work:
    """All stages. `direct`: one call over all rows and keys in order, whose result needs no merge."""

    num_rows: int
    stages: tuple[Stage, ...]
    direct: bool


def prepare(plan: RingPlan, device: torch.device) -> Work:
    """Copy a plan's integers to `device`."""
    stages = tuple(
        Stage(
            source=step.source,
            reader=step.reader,
            send=_index(step.send_rows, device),
            num_sent=step.num_sent,
            num_received=step.receive_rows,
            calls=tuple(_call(tiles, device) for tiles in group_by_window(step.tiles)),
        )
        for step in plan.steps
    )
    calls = [call for stage in stages for call in stage.calls]
    whole = slice(0, plan.num_rows)
    alone = all(stage.num_sent == 0 and stage.num_received == 0 for stage in stages)
    direct = alone and len(calls) == 1 and calls[0].rows == whole and calls[0].keys == whole
    return Work(plan.num_rows, stages, direct)


def _call(tiles: Tiles, device: torch.device) -> Call:
    q_edges = np.concatenate(([0], np.cumsum(tiles.q1 - tiles.q0)))
    k_edges = np.concatenate(([0], np.cumsum(tiles.k1 - tiles.k0)))
    cu_q, cu_k = (torch.from_numpy(edges.astype(np.int32)).to(device) for edges in (q_edges, k_edges))
    keys = np.stack([tiles.k0, tiles.k1], axis=1)
    by_start = keys[np.argsort(keys[:, 0], kind="stable")]
    return Call(
        rows=_index(np.stack([tiles.q0, tiles.q1], axis=1), device),
        keys=_index(keys, device),
        keys_distinct=bool((by_start[1:, 0] >= by_start[:-1, 1]).all()),
        segments=Segments(
            tuple(q_edges.tolist()), tuple(k_edges.tolist()), int(tiles.left[0]), int(tiles.right[0]), cu_q, cu_k
        ),
    )


def _index(intervals: IntArray, device: torch.device) -> Index:
    """Rows of these intervals, in their order: a slice where they are consecutive, else their numbers."""
    if len(intervals) == 0:
        return slice(0, 0)
    if (intervals[1:, 0] == intervals[:-1, 1]).all():
        return slice(int(intervals[0, 0]), int(intervals[-1, 1]))
    return torch.from_numpy(np.concatenate([np.arange(a, b) for a, b in intervals])).to(device)


def head_runs(runs: Sequence[tuple[int, int, int, int]]) -> list[tuple[slice, slice]]:
    """Query-head and kv-head slices of the uniform runs of a `HeadShare`."""
    return [(slice(q0, q1), slice(k0, k1)) for q0, q1, k0, k1 in runs]
