"""A plan made ready for one device: indices and segment edges as tensors, once per batch and mask.

No layer plans, and none copies integers to the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .integers.layout import IntArray, Tiles
from .integers.plan import RingPlan, group_by_window
from .kernels import Segments

Index = slice | Tensor


@dataclass(frozen=True, eq=False)
class Parts:
    """How the parts of a sum over tiles lie on its rows.

    most: the largest number of parts that a row gets. blank: rows that have to be filled with nothing beforehand,
    because no tile reaches them, or the first one that does shares them with rows that have been reached before.
    """

    most: int
    blank: Index


@dataclass(frozen=True, eq=False)
class Call:
    """One kernel call: the query rows and key rows it gathers, and its segments.

    rows_fresh, keys_fresh: whether no call before has reached any of these rows (of these keys, in its stage), so that
    its results are written instead of added. keys_distinct: whether no key is gathered twice.
    """

    rows: Index
    keys: Index
    rows_fresh: bool
    keys_fresh: bool
    keys_distinct: bool
    segments: Segments


@dataclass(frozen=True, eq=False)
class Stage:
    """One step of the ring on this device; `source` and `reader` are ring ranks. keys: of the sums over its tiles."""

    source: int
    reader: int
    send: Index
    num_sent: int
    num_received: int
    calls: tuple[Call, ...]
    keys: Parts


@dataclass(frozen=True, eq=False)
class Work:
    """All stages. `direct`: one call over all rows and keys in order, whose result needs no merge.

    rows: of the sums over tiles of a query. keys: of the sums over own tiles and over what readers send home.
    """

    num_rows: int
    stages: tuple[Stage, ...]
    direct: bool
    rows: Parts
    keys: Parts


class _Reached:
    """Which rows have been reached, and by how many parts."""

    def __init__(self, num_rows: int) -> None:
        self.parts = np.zeros(num_rows, dtype=np.int64)
        self.blank = np.ones(num_rows, dtype=bool)

    def fresh(self, intervals: IntArray) -> bool:
        """Count one more part on these rows; whether it is the first on all of them, and the only one."""
        size = len(self.parts) + 1
        changes = np.bincount(intervals[:, 0], minlength=size) - np.bincount(intervals[:, 1], minlength=size)
        more = np.cumsum(changes)[:-1]
        fresh = bool(more.max(initial=0) <= 1) and not self.parts[more > 0].any()
        self.parts += more
        if fresh:
            self.blank[more > 0] = False
        return fresh

    def summary(self, device: torch.device) -> Parts:
        edges = np.flatnonzero(np.diff(np.concatenate(([0], self.blank, [0])).astype(np.int8)))
        return Parts(int(self.parts.max(initial=0)), _index(edges.reshape(-1, 2), device))


def prepare(plan: RingPlan, device: torch.device) -> Work:
    """Copy a plan's integers to `device`."""
    rows, keys = _Reached(plan.num_rows), _Reached(plan.num_rows)
    stages = []
    for i, step in enumerate(plan.steps):
        reached = _Reached(step.receive_rows) if i else keys
        calls = tuple(_call(tiles, rows, reached, device) for tiles in group_by_window(step.tiles))
        send = _index(step.send_rows, device)
        of_keys = reached.summary(device)
        stages.append(Stage(step.source, step.reader, send, step.num_sent, step.receive_rows, calls, of_keys))
    for step in plan.steps:
        keys.parts[expand(step.send_rows)] += 1
    every = [call for stage in stages for call in stage.calls]
    whole = slice(0, plan.num_rows)
    alone = all(stage.num_sent == 0 and stage.num_received == 0 for stage in stages)
    direct = alone and len(every) == 1 and every[0].rows == whole and every[0].keys == whole
    return Work(plan.num_rows, tuple(stages), direct, rows.summary(device), keys.summary(device))


def _call(tiles: Tiles, rows: _Reached, keys: _Reached, device: torch.device) -> Call:
    q_edges = np.concatenate(([0], np.cumsum(tiles.q1 - tiles.q0)))
    k_edges = np.concatenate(([0], np.cumsum(tiles.k1 - tiles.k0)))
    cu_q, cu_k = (torch.from_numpy(edges.astype(np.int32)).to(device) for edges in (q_edges, k_edges))
    of_rows, of_keys = np.stack([tiles.q0, tiles.q1], axis=1), np.stack([tiles.k0, tiles.k1], axis=1)
    by_start = of_keys[np.argsort(of_keys[:, 0], kind="stable")]
    return Call(
        rows=_index(of_rows, device),
        keys=_index(of_keys, device),
        rows_fresh=rows.fresh(of_rows),
        keys_fresh=keys.fresh(of_keys),
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
    return torch.from_numpy(expand(intervals)).to(device)


def expand(intervals: IntArray) -> IntArray:
    """The numbers inside the intervals [M, 2], in their order."""
    lengths = intervals[:, 1] - intervals[:, 0]
    ends = np.cumsum(lengths)
    return np.arange(int(lengths.sum())) + np.repeat(intervals[:, 0] - ends + lengths, lengths)


def head_runs(runs: Sequence[tuple[int, int, int, int]]) -> list[tuple[slice, slice]]:
    """Query-head and kv-head slices of the uniform runs of a `HeadShare`."""
    return [(slice(q0, q1), slice(k0, k1)) for q0, q1, k0, k1 in runs]
