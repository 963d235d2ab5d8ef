"""From intervals to tiles: segments of a variable-length FlashAttention call. Integers only: no torch.

A run of queries whose visible intervals form a band is a tile (`cut_tiles`). A tile is exactly one segment of a
variable-length FlashAttention call with a window, aligned to the bottom right corner.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .intervals import IntArray
from .masks import UNLIMITED


class Tiles(NamedTuple):
    """Tiles of one pair of shards, one entry per tile [N].

    Attributes:
        q0: first query row.
        q1: row after the last query row.
        k0: first key row.
        k1: row after the last key row.
        left: keys before the diagonal that a query sees; -1: no limit. The diagonal ends in the bottom right corner.
        right: keys after the diagonal that a query sees; -1: no limit.
    """

    q0: IntArray
    q1: IntArray
    k0: IntArray
    k1: IntArray
    left: IntArray
    right: IntArray

    def area(self) -> int:
        """Number of (query, key) pairs inside the tiles.

        >>> cut_tiles(np.zeros(4, dtype=int), np.arange(1, 5)).area()  # causal, 4 x 4
        10
        """
        lq, lk = self.q1 - self.q0, self.k1 - self.k0
        # Row i of a tile sees columns max(0, i + lk - lq - left) .. min(lk, i + lk - lq + right + 1) - 1. The columns
        # hidden to the right of (or left of) the band form a triangle that shrinks by one a row.
        hidden_right = np.where(self.right == UNLIMITED, 0, lq - 1 - self.right)
        hidden_left = np.where(self.left == UNLIMITED, 0, lk - 1 - self.left)
        triangle = hidden_right * (hidden_right + 1) // 2 + hidden_left * (hidden_left + 1) // 2
        return int((lq * lk - triangle).sum())


def cut_tiles(lo: IntArray, hi: IntArray) -> Tiles:
    """The fewest tiles that cover the visible intervals [lo, hi); each query that sees a key is in exactly one.

    Inside a tile `lo` stays constant and then grows by one a row; `hi` grows by one a row and then stays constant.
    Anything else (a jump, a row that sees nothing) starts a new tile.

    Two documents of 3 and 5 tokens under a causal mask are two tiles:

    >>> tiles = cut_tiles(np.array([0, 0, 0, 3, 3, 3, 3, 3]), np.arange(1, 9))
    >>> tiles.q0.tolist(), tiles.q1.tolist(), tiles.k0.tolist(), tiles.k1.tolist()
    ([0, 3], [3, 8], [0, 3], [3, 8])
    >>> tiles.left.tolist(), tiles.right.tolist()
    ([-1, -1], [0, 0])
    """
    if len(lo) == 0:
        return Tiles(*(np.zeros(0, dtype=np.int64) for _ in range(6)))
    d_lo, d_hi, alive = np.diff(lo), np.diff(hi), hi > lo
    cut = ~(alive[1:] & alive[:-1]) | (d_lo < 0) | (d_lo > 1) | (d_hi < 0) | (d_hi > 1)
    d_lo, d_hi = np.where(cut, 0, d_lo), np.where(cut, 1, d_hi)
    cut[1:] |= (d_lo[1:] < d_lo[:-1]) | (d_hi[1:] > d_hi[:-1])
    edges = np.flatnonzero(cut) + 1
    q0 = np.concatenate(([0], edges))
    q1 = np.concatenate((edges, [len(lo)]))
    keep = alive[q0]
    q0, q1 = q0[keep], q1[keep]
    k0, k1 = lo[q0], hi[q1 - 1]
    lq, lk = q1 - q0, k1 - k0
    left = np.where(lo[q1 - 1] > k0, lk - 1 - (lo[q1 - 1] - k0), UNLIMITED)
    right = np.where(hi[q0] < k1, hi[q0] - k0 - 1 - (lk - lq), UNLIMITED)
    return Tiles(q0, q1, k0, k1, left, right)


def group_by_window(tiles: Tiles) -> list[Tiles]:
    """Tiles grouped by window: one variable-length call computes a group.

    >>> tiles = cut_tiles(np.array([0, 0, 0, 3, 3, 3, 3, 3]), np.arange(1, 9))
    >>> [len(group.q0) for group in group_by_window(tiles)]
    [2]
    """
    windows, which = np.unique(np.stack([tiles.left, tiles.right], axis=1), axis=0, return_inverse=True)
    return [Tiles(*(field[which.ravel() == i] for field in tiles)) for i in range(len(windows))]
