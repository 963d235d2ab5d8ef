"""The ring schedule: which key rows each ring rank sends, receives and computes with in one attention call. No torch.

For every pair of ring ranks the schedule names exactly the key rows that some query of the receiver sees. Their owner
sends them directly; a pair whose queries see nothing exchanges nothing. Step 0 is the rank's own tokens. In each later
step every rank receives from one rank and sends to one rank, so every link is used once (`partners`).

Causal zigzag needs at least 0.75 of the bytes that a ring of full blocks sends, per rank and layer.
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
    """One exchange of key rows, and the tiles that it makes possible.

    Attributes:
        recv_rank: ring rank that this rank receives from.
        send_rank: ring rank that this rank sends to.
        send_intervals: intervals of own key rows that `send_rank` needs [M, 2]; sent packed, in this order.
        num_received: number of key rows that arrive.
        tiles: own queries against the packed rows that arrived (against own keys in step 0).
    """

    recv_rank: int
    send_rank: int
    send_intervals: IntArray
    num_received: int
    tiles: Tiles

    @property
    def num_sent(self) -> int:
        """Number of key rows that this rank sends."""
        return int((self.send_intervals[:, 1] - self.send_intervals[:, 0]).sum())


@dataclass(frozen=True, eq=False)
class RingSchedule:
    """All steps of one ring rank for one mask.

    Attributes:
        rank: the ring rank.
        num_tokens: its number of tokens, over all rows of the batch.
        steps: step 0 (own tokens), then one step for each other ring rank.
    """

    rank: int
    num_tokens: int
    steps: tuple[RingStep, ...]

    @property
    def area(self) -> int:
        """(query, key) pairs that this rank computes."""
        return sum(step.tiles.area() for step in self.steps)

    @property
    def rows_received(self) -> int:
        """Key rows that this rank receives in one forward pass."""
        return sum(step.num_received for step in self.steps)

    @property
    def rows_sent(self) -> int:
        """Key rows that this rank sends in one forward pass."""
        return sum(step.num_sent for step in self.steps)

    @property
    def messages(self) -> int:
        """Key-value messages that this rank sends in one forward pass."""
        return sum(step.num_sent > 0 for step in self.steps)


def ring_per_node(ranks: Sequence[int], ulysses: int, node: int) -> int:
    """Consecutive ring ranks on one node of `node` ranks, where `ranks` share a sequence; 1 where nodes differ in it.

    Global ranks are numbered node by node, as launchers do. A ring rank is `ulysses` consecutive ranks.

    >>> ring_per_node(range(8), ulysses=2, node=4)
    2
    """
    nodes = [rank // node for rank in ranks]
    together = len(nodes) // len(set(nodes))
    if together % ulysses or nodes != [it for it in dict.fromkeys(nodes) for _ in range(together)]:
        return 1
    return together // ulysses


def shifts(ring: int, per_node: int) -> list[tuple[int, int]]:
    """Distance in nodes and in ranks of a node of each step after step 0; `per_node` consecutive ranks share a node.

    Transfers between nodes come first. In such a step all ranks of a node send to another node, each over its own
    link and to a different rank. Transfers inside the node come last: the last dK and dV of the backward are the one
    transfer that overlaps with nothing, and so they use the fast link.

    >>> shifts(ring=4, per_node=2)
    [(1, 0), (1, 1), (0, 1)]
    """
    nodes = ring // per_node
    return [(far, near) for far in (*range(1, nodes), 0) for near in range(per_node) if far or near]


def partners(ring: int, per_node: int, rank: int) -> list[tuple[int, int]]:
    """(recv_rank, send_rank) of a ring rank in each step after step 0, in the order of `shifts`.

    On one node, or with one rank on each, step i pairs rank r with r - i and r + i.

    >>> partners(ring=4, per_node=1, rank=1)
    [(0, 2), (3, 3), (2, 0)]
    """
    nodes, (node, place) = ring // per_node, divmod(rank, per_node)

    def at(far: int, near: int) -> int:
        return (node + far) % nodes * per_node + (place + near) % per_node

    return [(at(-far, -near), at(far, near)) for far, near in shifts(ring, per_node)]


def make_ring_schedule(shards: Sequence[IntArray], mask: Mask, rank: int, per_node: int = 1) -> RingSchedule:
    """Schedule of ring rank `rank`, where rank r holds the ascending global positions `shards[r]`.

    Args:
        shards: positions of each ring rank, flattened over the batch.
        mask: over the same positions.
        rank: the ring rank.
        per_node: consecutive ring ranks that share a node (a divisor of their number). It is not used under a window:
            there a rank exchanges with its neighbours only, and they come first in the order of ranks.

    Raises:
        UspConfigError: a rank without a shard.

    Eight tokens, causal, zigzag: rank 0 holds 0, 1, 6, 7. Rank 1 (2, 3, 4, 5) sees tokens 0 and 1, rows 0 and 1 of rank
    0; queries 6 and 7, rows 2 and 3 of rank 0, see all four keys of rank 1.

    >>> from .masks import Documents
    >>> shards = [np.array([0, 1, 6, 7]), np.array([2, 3, 4, 5])]
    >>> schedule = make_ring_schedule(shards, Mask(Documents.from_bounds([0, 8])), rank=0)
    >>> own, other = schedule.steps
    >>> other.send_intervals.tolist(), other.num_sent, other.num_received
    ([[0, 2]], 2, 4)
    >>> [int(x[0]) for x in other.tiles]  # q0, q1, k0, k1, left, right
    [2, 4, 0, 4, -1, -1]
    >>> schedule.area, schedule.rows_sent, schedule.rows_received, schedule.messages
    (18, 2, 4, 1)
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
    """Whether some document is longer than the window before its queries."""
    longest = int((mask.documents.last - mask.documents.first).max(initial=0))
    return UNLIMITED < mask.left < longest - 1


def _rows(held: Runs, wanted: IntArray) -> IntArray:
    """Rows of a shard that lie in sorted intervals of positions, as sorted disjoint intervals [M, 2]."""
    return merge_intervals(rows_before(held, wanted[:, 0]), rows_before(held, wanted[:, 1]))
