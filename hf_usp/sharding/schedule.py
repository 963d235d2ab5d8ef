"""What each ring rank computes and sends: the integer plan of one attention call. No torch.

The plan names, for every pair of ring ranks, exactly the key rows that some query of the send_rank sees. They go
straight from their owner to the send_rank; a pair that sees nothing exchanges nothing. Step 0 is the rank's own tokens;
each step after it pairs every rank with one recv_rank and one send_rank, so every link is used once (`partners`).

Byte floor, causal zigzag, per rank and layer: 0.75 of what relaying whole blocks around the ring moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UspConfigError
from .intervals import IntArray, Runs, compact_intervals, find_runs, merge_intervals, rows_before
from .masks import UNLIMITED, Mask
from .tiles import Tiles, cut_tiles


@dataclass(frozen=True, eq=False)
class RingStep:
    """One exchange and the tiles it makes possible.

    recv_rank, send_rank: ring ranks that this rank receives from and sends to.
    send_intervals [M, 2]: intervals of own key rows that the send_rank needs; they arrive packed, in this order.
    num_received: number of key rows that arrive.
    tiles: bands of own queries against the packed rows that arrived (own keys in step 0).
    """

    recv_rank: int
    send_rank: int
    send_intervals: IntArray
    num_received: int
    tiles: Tiles

    @property
    def num_sent(self) -> int:
        return int((self.send_intervals[:, 1] - self.send_intervals[:, 0]).sum())


@dataclass(frozen=True, eq=False)
class RingSchedule:
    """All steps of one ring rank for one mask. `num_tokens` is its number of tokens."""

    rank: int
    num_tokens: int
    steps: tuple[RingStep, ...]

    @property
    def area(self) -> int:
        """(query, key) pairs that this rank computes."""
        return sum(step.tiles.area() for step in self.steps)

    @property
    def rows_received(self) -> int:
        return sum(step.num_received for step in self.steps)

    @property
    def rows_sent(self) -> int:
        return sum(step.num_sent for step in self.steps)

    @property
    def messages(self) -> int:
        """Key-value messages that this rank sends in one forward pass."""
        return sum(step.num_sent > 0 for step in self.steps)


def ring_per_node(ranks: Sequence[int], ulysses: int, node: int) -> int:
    """Consecutive ring ranks that share a node of `node` ranks, when `ranks` share a sequence; 1 where that differs.

    Global ranks are numbered node by node, as launchers do; a ring rank is `ulysses` of them in order.
    """
    nodes = [rank // node for rank in ranks]
    together = len(nodes) // len(set(nodes))
    if together % ulysses or nodes != [it for it in dict.fromkeys(nodes) for _ in range(together)]:
        return 1
    return together // ulysses


def shifts(ring: int, per_node: int) -> list[tuple[int, int]]:
    """Nodes and places that each step after a rank's own shifts by, where `per_node` ranks in order share a node.

    Transfers between nodes come first: in such a step all ranks of a node send to another node, each over its own
    link and to a rank of its own. Those inside the node come last, so that the one transfer of the backward that
    nothing hides, the last gradients on their way home, is a short one.
    """
    nodes = ring // per_node
    return [(far, near) for far in (*range(1, nodes), 0) for near in range(per_node) if far or near]


def partners(ring: int, per_node: int, rank: int) -> list[tuple[int, int]]:
    """Source and send_rank of a ring rank in each step after its own, in the order of `shifts`.

    On one node, or with one rank on each, step i pairs rank r with r - i and r + i.
    """
    nodes, (node, place) = ring // per_node, divmod(rank, per_node)

    def at(far: int, near: int) -> int:
        return (node + far) % nodes * per_node + (place + near) % per_node

    return [(at(-far, -near), at(far, near)) for far, near in shifts(ring, per_node)]


def make_ring_schedule(shards: Sequence[IntArray], mask: Mask, rank: int, per_node: int = 1) -> RingSchedule:
    """Plan of ring rank `rank` when rank r holds the ascending global positions `shards[r]`.

    per_node: consecutive ring ranks that share a node (a divisor of their number). Under a window a rank meets its
    neighbours alone; they are the first in the order of ranks, which is kept there.
    """
    if not 0 <= rank < len(shards):
        raise UspConfigError(
            f"ring rank {rank} of {len(shards)}",
            rule="ring ranks count from 0, and each has a shard",
            remedy=f"pass a rank from 0 to {len(shards) - 1}, or the shards of all ring ranks",
        )
    ring, mine = len(shards), shards[rank]
    runs = [find_runs(shard) for shard in shards]
    seen, reach = mask.interval(mine), mask.reach(runs[rank])
    nothing = np.zeros((0, 2), dtype=np.int64)
    own = cut_tiles(rows_before(runs[rank], seen[0]), rows_before(runs[rank], seen[1]))
    steps = [RingStep(rank, rank, nothing, 0, own)]
    for recv_rank, send_rank in partners(ring, 1 if _has_window(mask) else per_node, rank):
        send, rows = _rows(runs[rank], mask.reach(runs[send_rank])), _rows(runs[recv_rank], reach)
        tiles = cut_tiles(nothing[:, 0], nothing[:, 1])
        if len(rows):
            lo, hi = (rows_before(runs[recv_rank], edge) for edge in seen)
            tiles = cut_tiles(*compact_intervals(lo, hi, rows))
        steps.append(RingStep(recv_rank, send_rank, send, int((rows[:, 1] - rows[:, 0]).sum()), tiles))
    return RingSchedule(rank, len(mine), tuple(steps))


def _has_window(mask: Mask) -> bool:
    """Whether some document is longer than what its queries see before them."""
    longest = int((mask.documents.last - mask.documents.first).max(initial=0))
    return UNLIMITED < mask.left < longest - 1


def _rows(held: Runs, wanted: IntArray) -> IntArray:
    """Rows of a shard that lie in sorted intervals of positions, as sorted disjoint intervals [M, 2]."""
    return merge_intervals(rows_before(held, wanted[:, 0]), rows_before(held, wanted[:, 1]))
