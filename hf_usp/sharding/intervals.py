"""Intervals and runs of token positions. Integers only: no torch.

A shard holds ascending positions, so it is a list of runs of consecutive positions. An interval [lo, hi) of global
positions is then an interval of rows of the shard (`rows_before`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

IntArray = np.ndarray


class Runs(NamedTuple):
    """Runs of consecutive positions in a shard.

    Attributes:
        start: first position of each run [N].
        stop: position after the last one of each run [N].
        row: row of the shard that holds the first position [N].
    """

    start: IntArray
    stop: IntArray
    row: IntArray


def find_runs(shard: IntArray) -> Runs:
    """The runs of the ascending positions `shard` [L].

    >>> runs = find_runs(np.array([0, 1, 6, 7]))  # rank 0 of 2 in zigzag order
    >>> runs.start.tolist(), runs.stop.tolist(), runs.row.tolist()
    ([0, 6], [2, 8], [0, 2])
    """
    row = np.flatnonzero(np.concatenate(([True], shard[1:] - shard[:-1] != 1))[: len(shard)])
    start = shard[row]
    return Runs(start, start + np.diff(np.append(row, len(shard))), row)


def rows_before(runs: Runs, positions: IntArray) -> IntArray:
    """How many rows of a shard lie before each of the ascending `positions`.

    The count is constant before, between and after the runs. It grows by one a position inside them.

    >>> runs = find_runs(np.array([0, 1, 6, 7]))
    >>> rows_before(runs, np.array([0, 2, 5, 7, 8])).tolist()
    [0, 2, 2, 3, 4]
    """
    pieces = np.searchsorted(positions, np.stack(runs[:2], axis=1).ravel())
    counts = np.diff(np.concatenate(([0], pieces, [len(positions)])))
    offset, climbs = np.zeros(len(counts), dtype=np.int64), np.zeros(len(counts), dtype=np.int64)
    offset[1::2], climbs[1::2] = runs.row - runs.start, 1
    offset[2::2] = runs.row + runs.stop - runs.start
    rows = np.repeat(climbs, counts)
    rows *= positions
    rows += np.repeat(offset, counts)
    return rows


def merge_intervals(lo: IntArray, hi: IntArray) -> IntArray:
    """Union of the ascending intervals [lo, hi), as sorted disjoint intervals [M, 2]; empty ones (hi <= lo) drop out.

    >>> merge_intervals(np.array([0, 2, 6]), np.array([3, 4, 8])).tolist()
    [[0, 4], [6, 8]]
    """
    alive = hi > lo
    lo, hi = lo[alive], hi[alive]
    apart = lo[1:] > hi[:-1]
    return np.stack((lo[np.append(True, apart)[: len(lo)]], hi[np.append(apart, True)[: len(hi)]]), axis=1)


def compact_intervals(lo: IntArray, hi: IntArray, rows: IntArray) -> tuple[IntArray, IntArray]:
    """The same intervals as rows of a buffer that holds only `rows` (as `merge_intervals` returns them).

    >>> rows = np.array([[2, 4], [6, 8]])  # four rows arrive; row 6 becomes row 2 of the buffer
    >>> [x.tolist() for x in compact_intervals(np.array([2, 6]), np.array([4, 8]), rows)]
    [[0, 2], [2, 4]]
    """
    lengths = rows[:, 1] - rows[:, 0]
    new_lo = rows_before(Runs(rows[:, 0], rows[:, 1], np.cumsum(lengths) - lengths), lo)
    return new_lo, new_lo + np.maximum(hi - lo, 0)
