"""A ring schedule on one device: indices and segment edges as tensors, made once per batch and mask.

So no layer computes a schedule or copies integers to the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..kernels import Segments
from ..sharding.intervals import IntArray
from ..sharding.schedule import RingSchedule
from ..sharding.tiles import Tiles, group_by_window
from ..utils.upload import upload_fields

Index = slice | Tensor

# Recognised by identity, so that no view is made of what is whole and nothing is filled that is empty.
EVERY, NONE = slice(None), slice(0, 0)


@dataclass(frozen=True, eq=False)
class WriteCounts:
    """How the parts of a sum over tiles cover its rows.

    Attributes:
        max_parts: largest number of parts that one row gets.
        rows_to_zero: rows that must be initialised (output 0, lse -inf), because no tile writes them first.
    """

    max_parts: int
    rows_to_zero: Index


@dataclass(frozen=True, eq=False)
class KernelCall:
    """One kernel call over the tiles of a step that share a window.

    Attributes:
        rows: query rows that it gathers.
        keys: key rows that it gathers.
        first_write_q: whether no earlier call wrote any of these query rows, so results are written instead of
            merged.
        first_write_k: whether no earlier call of the step wrote gradients of any of these keys.
        unique_keys: whether no key is gathered twice.
        segments: the tiles.
    """

    rows: Index
    keys: Index
    first_write_q: bool
    first_write_k: bool
    unique_keys: bool
    segments: Segments


@dataclass(frozen=True, eq=False)
class DeviceStep:
    """One step of the ring on this device.

    Attributes:
        recv_rank: ring rank that this rank receives from.
        send_rank: ring rank that this rank sends to.
        send: own key rows to send.
        num_sent: number of key rows sent.
        num_received: number of key rows received.
        calls: kernel calls of the step.
        keys: write counts of dK and dV of the received keys.
    """

    recv_rank: int
    send_rank: int
    send: Index
    num_sent: int
    num_received: int
    calls: tuple[KernelCall, ...]
    keys: WriteCounts


@dataclass(frozen=True, eq=False)
class DeviceSchedule:
    """The ring schedule on this device.

    Attributes:
        num_rows: number of own tokens.
        stages: the steps.
        is_single_call: whether one call over all rows and keys in order is the full result, so nothing is merged.
        rows: write counts of the output and of dQ.
        keys: write counts of dK and dV of own keys, gradients from other ranks included.
    """

    num_rows: int
    stages: tuple[DeviceStep, ...]
    is_single_call: bool
    rows: WriteCounts
    keys: WriteCounts


class _WriteTracker:
    """Which rows have been reached, and by how many parts."""

    def __init__(self, num_rows: int) -> None:
        self.parts = np.zeros(num_rows, dtype=np.int64)
        self.rows_to_zero = np.ones(num_rows, dtype=bool)

    def is_first_write(self, intervals: IntArray) -> bool:
        """Count one more part on these rows; whether it is the first on all of them, and the only one."""
        size = len(self.parts) + 1
        changes = np.bincount(intervals[:, 0], minlength=size) - np.bincount(intervals[:, 1], minlength=size)
        more = np.cumsum(changes)[:-1]
        first = bool(more.max(initial=0) <= 1) and not self.parts[more > 0].any()
        self.parts += more
        if first:
            self.rows_to_zero[more > 0] = False
        return first

    def summary(self) -> WriteCounts:
        edges = np.flatnonzero(np.diff(np.concatenate(([0], self.rows_to_zero, [0])).astype(np.int8)))
        intervals = edges.reshape(-1, 2)
        return WriteCounts(int(self.parts.max(initial=0)), _index(intervals, len(self.parts)))


def make_device_schedule(plan: RingSchedule, device: torch.device) -> DeviceSchedule:
    """A plan's integers on `device`, copied there at once."""
    rows, keys = _WriteTracker(plan.num_tokens), _WriteTracker(plan.num_tokens)
    stages: list[DeviceStep] = []
    for i, step in enumerate(plan.steps):
        reached = _WriteTracker(step.num_received) if i else keys
        calls = tuple(_call(tiles, rows, reached) for tiles in group_by_window(step.tiles))
        send = _index(step.send_intervals, plan.num_tokens)
        of_keys = reached.summary()
        stages.append(
            DeviceStep(step.recv_rank, step.send_rank, send, step.num_sent, step.num_received, calls, of_keys)
        )
    for step in plan.steps:
        keys.parts[expand_intervals(step.send_intervals)] += 1
    every = [call for stage in stages for call in stage.calls]
    alone = all(stage.num_sent == 0 and stage.num_received == 0 for stage in stages)
    is_single_call = alone and len(every) == 1 and every[0].rows is EVERY and every[0].keys is EVERY
    schedule = DeviceSchedule(plan.num_tokens, tuple(stages), is_single_call, rows.summary(), keys.summary())
    return upload_fields(schedule, device)


def _call(tiles: Tiles, rows: _WriteTracker, keys: _WriteTracker) -> KernelCall:
    q_offsets = np.concatenate(([0], np.cumsum(tiles.q1 - tiles.q0)))
    k_offsets = np.concatenate(([0], np.cumsum(tiles.k1 - tiles.k0)))
    cu_seqlens_q, cu_seqlens_k = (torch.from_numpy(edges.astype(np.int32)) for edges in (q_offsets, k_offsets))
    of_rows, of_keys = np.stack([tiles.q0, tiles.q1], axis=1), np.stack([tiles.k0, tiles.k1], axis=1)
    by_start = of_keys[np.argsort(of_keys[:, 0], kind="stable")]
    return KernelCall(
        rows=_index(of_rows, len(rows.parts)),
        keys=_index(of_keys, len(keys.parts)),
        first_write_q=rows.is_first_write(of_rows),
        first_write_k=keys.is_first_write(of_keys),
        unique_keys=bool((by_start[1:, 0] >= by_start[:-1, 1]).all()),
        segments=Segments(
            tuple(q_offsets.tolist()),
            tuple(k_offsets.tolist()),
            int(tiles.left[0]),
            int(tiles.right[0]),
            cu_seqlens_q,
            cu_seqlens_k,
        ),
    )


def _index(intervals: IntArray, num_rows: int) -> Index:
    """Rows of these intervals, in their order: a slice where they are consecutive, else their numbers.

    `EVERY` for all of `num_rows`, `NONE` for none.
    """
    if len(intervals) == 0:
        return NONE
    if (intervals[1:, 0] == intervals[:-1, 1]).all():
        start, stop = int(intervals[0, 0]), int(intervals[-1, 1])
        return EVERY if (start, stop) == (0, num_rows) else slice(start, stop)
    return torch.from_numpy(expand_intervals(intervals))


def expand_intervals(intervals: IntArray) -> IntArray:
    """The numbers inside the intervals [M, 2], in their order."""
    lengths = intervals[:, 1] - intervals[:, 0]
    ends = np.cumsum(lengths)
    return np.arange(int(lengths.sum())) + np.repeat(intervals[:, 0] - ends + lengths, lengths)


def head_runs(runs: Sequence[tuple[int, int, int, int]]) -> list[tuple[slice, slice]]:
    """Query-head and kv-head slices of the uniform runs of a `HeadShare`; one run is all of its heads."""
    if len(runs) == 1:
        return [(EVERY, EVERY)]
    return [(slice(q0, q1), slice(k0, k1)) for q0, q1, k0, k1 in runs]


def take(x: Tensor, index: Index) -> Tensor:
    """x[index]: the tensor itself for `EVERY`, a view for another slice."""
    return x if index is EVERY else x[index]
