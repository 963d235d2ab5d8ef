"""Chunks of a row assigned to ring ranks so that all compute and fetch for equally long: greedily, then by swaps.

Objective: the sum over ranks of the squared excess, where a rank's excess is the key rows that it fetches plus the mask
area above its allowance (`_exchange`). Integers only: no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .intervals import IntArray
from .masks import Mask

# Chunks for each ring rank that are tried, and the shortest that is worth a kernel call of its own.
PIECES = (2, 4, 8, 16, 32, 64)


# A rank may have this much more work than the mean before another assignment is searched.
UNEVEN = 0.05


# Fetching the key and value of a token takes as long as computing this many (query, key) pairs: 4 query heads a kv
# head, 4 operations a pair and number, bf16, and 1000 operations in the time that a byte travels (H100, NVLink).
PAIRS_PER_ROW = 250


# Swaps of chunks for each assignment, and the numbers that they may look at in all: some ten milliseconds.
EXCHANGES, LOOKS = 40, 2_000_000


class Chunks(NamedTuple):
    """Chunks of a row, and the ring rank of each. No chunk is empty.

    Attributes:
        edges: chunk i holds the positions edges[i] .. edges[i + 1] - 1 [C + 1].
        owner: ring rank of each chunk [C].
        ring: number of ring ranks.
    """

    edges: IntArray
    owner: IntArray
    ring: int


def without_empty(edges: IntArray, owner: IntArray, ring: int) -> Chunks:
    """The same chunks without empty ones.

    >>> chunks = without_empty(np.array([0, 2, 2, 4]), np.array([0, 1, 1]), ring=2)
    >>> chunks.edges.tolist(), chunks.owner.tolist()
    ([0, 2, 4], [0, 1])
    """
    filled = np.diff(edges) > 0
    return Chunks(np.append(edges[:-1][filled], edges[-1]), owner[filled], ring)


class MaskLoad:
    """The work of chunks of a row, summed over all rows and layers.

    >>> from .masks import Documents
    >>> load = MaskLoad([Mask(Documents.from_bounds([0, 8]))], batch=1, num_tokens=8)
    >>> load.areas(np.array([0, 2, 4, 6, 8])).tolist(), load.total  # causal: later chunks have more pairs
    ([3, 7, 11, 15], 36)
    >>> load.busiest(Chunks(np.array([0, 2, 4, 6, 8]), np.array([0, 1, 1, 0]), 2))
    18
    """

    def __init__(self, masks: Sequence[Mask], batch: int, num_tokens: int) -> None:
        self.masks, self.batch, self.num_tokens = Counter(masks), batch, num_tokens
        self.total = int(self.areas(np.array([0, num_tokens]))[0])

    def areas(self, edges: IntArray) -> IntArray:
        """Mask area of each chunk."""
        positions = (np.arange(self.batch)[:, None] * self.num_tokens + edges).ravel()
        before = sum(layers * mask.area_before(positions) for mask, layers in self.masks.items())
        return np.diff(np.asarray(before).reshape(self.batch, -1), axis=1).sum(0)

    def busiest(self, chunks: Chunks) -> int:
        """Mask area of the rank that has most."""
        held = np.zeros(chunks.ring, dtype=np.int64)
        np.add.at(held, chunks.owner, self.areas(chunks.edges))
        return int(held.max())

    def cost(self, chunks: Chunks) -> float:
        """Area of the busiest rank, and what the rank that fetches most could have computed meanwhile."""
        fetched = np.zeros(chunks.ring)
        for mask, layers in self.masks.items():
            lo, hi = self.seen(chunks.edges, mask)
            for rank in range(chunks.ring):
                mine = chunks.owner == rank
                first, last = lo[:, mine].ravel(), hi[:, mine].ravel()
                reached = np.concatenate(([0], np.maximum.accumulate(last)[:-1]))
                needed = np.maximum(last - np.maximum(first, reached), 0).sum()
                fetched[rank] += layers * max(0, needed - self.batch * self.num_tokens // chunks.ring)
        return self.busiest(chunks) + PAIRS_PER_ROW * float(fetched.max())

    def seen(self, edges: IntArray, mask: Mask) -> tuple[IntArray, IntArray]:
        """First and past-the-last position that the chunks of each row see [batch, C]."""
        rows = np.arange(self.batch)[:, None] * self.num_tokens
        lo, hi = mask.interval((rows + edges[:-1]).ravel())[0], mask.interval((rows + edges[1:] - 1).ravel())[1]
        return lo.reshape(self.batch, -1), hi.reshape(self.batch, -1)


def balanced_assignments(load: MaskLoad, ring: int, shortest: int) -> list[Chunks]:
    """Assignments with 2, 4, ... chunks for each rank, up to the first whose busiest rank is near the mean.

    >>> from .masks import Documents
    >>> load = MaskLoad([Mask(Documents.from_bounds([0, 6, 8]))], batch=1, num_tokens=8)
    >>> min(load.busiest(chunks) for chunks in balanced_assignments(load, ring=2, shortest=1)), load.total
    (12, 24)
    """
    found: list[Chunks] = []
    for pieces in PIECES:
        size = load.num_tokens // (ring * pieces)
        if size < max(1, shortest) and found:
            break
        found.append(_assign_greedily(load, ring, max(1, size)))
        tries = min(EXCHANGES, LOOKS * ring // (load.batch * len(found[-1].owner) ** 3))
        if tries:
            found.append(_swap_chunks(found[-1], load, tries))
        if min(load.busiest(chunks) for chunks in found[-2:]) <= (1 + UNEVEN) * load.total / ring:
            break
    return found


def _assign_greedily(load: MaskLoad, ring: int, size: int) -> Chunks:
    """Chunks of `size` tokens, heaviest first, `ring` at a time: the heaviest of them to the rank with the least."""
    rounds = load.num_tokens // (ring * size)
    rest = (load.num_tokens - rounds * ring * size) // ring  # the last tokens, one short chunk for each rank
    edges = np.concatenate((np.arange(rounds * ring) * size, rounds * ring * size + np.arange(ring + 1) * rest))
    weight = load.areas(edges)
    owner, held = np.empty(len(weight), dtype=np.int64), np.zeros(ring, dtype=np.int64)
    by_weight = np.argsort(-weight[: rounds * ring], kind="stable").reshape(rounds, ring)
    for together in (*by_weight, np.argsort(-weight[rounds * ring :], kind="stable") + rounds * ring):
        lightest = np.argsort(held, kind="stable")
        owner[together] = lightest
        held[lightest] += weight[together]
    return without_empty(edges, owner, ring)


def _swap_chunks(chunks: Chunks, load: MaskLoad, tries: int) -> Chunks:
    """The same chunks after swaps of two each. A swap takes work or fetched keys off the rank with the largest excess.

    A rank's excess is what it fetches and the area above its allowance. A swap lowers the sum of the squares.
    """
    edges, owner, ring = chunks.edges, chunks.owner.copy(), chunks.ring
    need, length, area = _fetch_costs(edges, load), np.diff(edges), load.areas(edges).astype(np.float64)
    allowance = (1 + 0.8 * UNEVEN) * area.sum() / ring
    columns = np.tile(np.arange(len(owner)), load.batch)
    held = np.bincount(owner, weights=area, minlength=ring)
    # Of each chunk: what the other chunks of its rank need of every chunk, and which chunks those do not hold.
    rest, foreign = np.empty_like(need), np.empty(need.shape)
    excess = np.empty(ring)

    def update(rank: int) -> None:
        mine = np.flatnonzero(owner == rank)
        largest = np.sort(np.concatenate((need[mine], np.zeros((2, need.shape[1])))), axis=0)[-2:]
        rest[mine] = np.where(need[mine] == largest[1], largest[0], largest[1])
        outside = owner[columns] != rank
        foreign[mine] = outside | (columns == mine[:, None])
        excess[rank] = max(held[rank] - allowance, 0.0) + largest[1][outside].sum()

    def after(give: IntArray, take: IntArray) -> IntArray:
        """Excess of the ranks of `give` [G, T] when they get chunks `take` for them."""
        largest = np.maximum(rest[give][:, None], need[take][None])
        fetched = (largest @ foreign[give][:, :, None])[..., 0]
        # They hold the tiles that they take; all of them miss these now.
        taken = take[:, None] + len(owner) * np.arange(load.batch)
        fetched -= largest[:, np.arange(len(take))[:, None], taken].sum(2)
        there = held[owner[give]][:, None] + area[take] - area[give][:, None]
        return np.maximum(there - allowance, 0.0) + fetched

    for rank in range(ring):
        update(rank)
    for _ in range(tries):
        for rank in np.argsort(-excess):
            mine, others = np.flatnonzero(owner == rank), np.flatnonzero(owner != rank)
            gain = (
                excess[rank] ** 2 + excess[owner[others]] ** 2 - after(mine, others) ** 2 - after(others, mine).T ** 2
            )
            gain[length[mine][:, None] != length[others]] = 0.0
            i, k = np.unravel_index(int(gain.argmax()), gain.shape)
            if gain[i, k] > 1e-3 * excess[rank] ** 2:
                break
        else:
            break
        give, take = mine[i], others[k]
        other = int(owner[take])
        owner[give], owner[take] = other, rank
        held[rank] += area[take] - area[give]
        held[other] += area[give] - area[take]
        update(int(rank))
        update(other)
    return Chunks(edges, owner, ring)


def _fetch_costs(edges: IntArray, load: MaskLoad) -> IntArray:
    """Cost of fetching each chunk (of each row) that the queries of a chunk see [C, batch * C]."""
    start, stop = edges[:-1], edges[1:]
    need = np.zeros((len(start), load.batch, len(start)))
    rows = np.arange(load.batch)[:, None] * load.num_tokens
    for mask, layers in load.masks.items():
        lo, hi = (x - rows for x in load.seen(edges, mask))
        overlap = np.minimum(hi[..., None], stop) - np.maximum(lo[..., None], start)
        need += PAIRS_PER_ROW * layers * np.maximum(overlap, 0).transpose(1, 0, 2)
    return need.reshape(len(start), -1)
