"""What each ring rank computes and sends: the integer plan of one attention call. No torch.

The plan names, for every pair of ring ranks, exactly the key rows that some query of the reader sees. They go straight
from their owner to the reader; a pair that sees nothing exchanges nothing. Step i pairs rank r with its source r - i
and its reader r + i, so in each step every link is used once. Step 0 is the rank's own tokens.

Byte floor, causal zigzag, per rank and layer: 0.75 of what relaying whole blocks around the ring moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import UspConfigError
from .layout import IntArray, Mask, Tiles, compact, cut_tiles, needed_rows, visible


@dataclass(frozen=True, eq=False)
class Step:
    """One exchange and the tiles it makes possible.

    source, reader: ring ranks that this rank receives from and sends to.
    send_rows [M, 2]: intervals of own key rows that the reader needs; they arrive packed, in this order.
    receive_rows: number of key rows that arrive.
    tiles: bands of own queries against the packed rows that arrived (own keys in step 0).
    """

    source: int
    reader: int
    send_rows: IntArray
    receive_rows: int
    tiles: Tiles

    @property
    def num_sent(self) -> int:
        return int((self.send_rows[:, 1] - self.send_rows[:, 0]).sum())


@dataclass(frozen=True, eq=False)
class RingPlan:
    """All steps of one ring rank for one mask. `num_rows` is its number of tokens."""

    rank: int
    num_rows: int
    steps: tuple[Step, ...]

    @property
    def area(self) -> int:
        """(query, key) pairs that this rank computes."""
        return sum(step.tiles.area() for step in self.steps)

    @property
    def rows_received(self) -> int:
        return sum(step.receive_rows for step in self.steps)

    @property
    def rows_sent(self) -> int:
        return sum(step.num_sent for step in self.steps)

    @property
    def messages(self) -> int:
        """Key-value messages that this rank sends in one forward pass."""
        return sum(step.num_sent > 0 for step in self.steps)


def make_plan(shards: Sequence[IntArray], mask: Mask, rank: int) -> RingPlan:
    """Plan of ring rank `rank` when rank r holds the ascending global positions `shards[r]`."""
    if not 0 <= rank < len(shards):
        raise UspConfigError(f"ring rank {rank} of {len(shards)}", rule="ring ranks count from 0")
    ring, mine = len(shards), shards[rank]
    nothing = np.zeros((0, 2), dtype=np.int64)
    steps = [Step(rank, rank, nothing, 0, cut_tiles(*visible(mine, mine, mask)))]
    for distance in range(1, ring):
        source, reader = (rank - distance) % ring, (rank + distance) % ring
        lo, hi = visible(mine, shards[source], mask)
        rows = needed_rows(lo, hi, len(shards[source]))
        send = needed_rows(*visible(shards[reader], mine, mask), len(mine))
        received = int((rows[:, 1] - rows[:, 0]).sum())
        steps.append(Step(source, reader, send, received, cut_tiles(*compact(lo, hi, rows))))
    return RingPlan(rank, len(mine), tuple(steps))


def group_by_window(tiles: Tiles) -> list[Tiles]:
    """Tiles that share a window, so that one variable-length call computes them all."""
    windows, which = np.unique(np.stack([tiles.left, tiles.right], axis=1), axis=0, return_inverse=True)
    return [Tiles(*(field[which.ravel() == i] for field in tiles)) for i in range(len(windows))]
