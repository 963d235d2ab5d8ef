"""Which ring rank gets which tokens of a row, chosen for the masks of a batch. Integers only: no torch.

Contiguous and zigzag are fixed patterns. Packed documents of uneven length leave some ranks of either with up to three
times the mean work; there a row is cut into chunks, which are dealt so that all ranks get as many tokens and nearly the
same mask area. Which chunks stand together decides how many keys a rank has to fetch, so chunks are then exchanged
between ranks as long as the rank that computes and fetches longest gets faster by it (`_exchange`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import UspConfigError
from .layout import ORDERS, IntArray, Mask, deal, find_runs, over_batch, rows_before

BALANCED = "balanced"
ALL_ORDERS = (*ORDERS, BALANCED)
# The fixed orders that "auto" chooses from; others are taken where they are asked for by name.
PATTERNS = ("contiguous", "zigzag")
# Chunks for each ring rank that are tried, and the shortest that is worth a kernel call of its own.
PIECES = (2, 4, 8, 16, 32, 64)
SHORTEST = 128
# A rank may have this share more than the mean before tokens are dealt otherwise.
UNEVEN = 0.05
# Share of the busiest rank's work that is worth waiting or moving more for.
WORTH = 0.01
# Fetching the key and value of a token takes as long as computing this many (query, key) pairs: 4 query heads a kv
# head, 4 operations a pair and number, bf16, and 1000 operations in the time that a byte travels (H100, NVLink).
PAIRS_PER_ROW = 250
# Exchanges of chunks for each deal, and the numbers that they may look at in all: some ten milliseconds.
EXCHANGES, LOOKS = 40, 2_000_000


class Dealt(NamedTuple):
    """Name of the order, and the positions of a row that each ring rank holds, ascending."""

    order: str
    shards: list[IntArray]


def deal_row(batch: int, num_tokens: int, ring: int, order: str, masks: Sequence[Mask]) -> Dealt:
    """Deal the tokens of each of `batch` rows to `ring` ranks, the same way in every row.

    Args:
        batch, num_tokens: rows, and tokens of a row (a multiple of `ring`).
        order: one of `ALL_ORDERS`, or "auto": contiguous or zigzag where the better one is even (`choose_order`),
            balanced where that costs less. A row that is one document is never dealt otherwise: a sliding window then
            moves its halo and no more.
        masks: over the whole batch, one entry per layer.
    """
    if order not in ("auto", *ALL_ORDERS):
        raise UspConfigError(
            f"sequence_order={order!r}", rule=f"an order is one of auto, {', '.join(ALL_ORDERS)}", remedy="use 'auto'"
        )
    if order in ORDERS or ring == 1:
        order = order if order in ORDERS else "contiguous"
        return Dealt(order, deal(num_tokens, ring, order))
    load = _Load(masks, batch, num_tokens)
    mean = load.total / ring
    if order == BALANCED:
        tried = _balanced(load, ring, 1)
        near = [chunks for chunks in tried if load.busiest(chunks) <= (1 + UNEVEN) * mean]
        best = min(near, key=load.cost) if near else min(tried, key=load.busiest)
        return Dealt(BALANCED, _shards(best))
    flat = {name: load.busiest(_fixed(num_tokens, ring, name)) for name in PATTERNS}
    if abs(flat["contiguous"] - flat["zigzag"]) > WORTH * max(flat.values()):
        given = min(flat, key=lambda name: flat[name])
    elif min(flat.values()) <= (1 + UNEVEN) * mean:
        given = choose_order(batch, num_tokens, ring, masks)
    else:
        given = min(PATTERNS, key=lambda name: load.cost(_fixed(num_tokens, ring, name)))
    if flat[given] > (1 + UNEVEN) * mean and _is_packed(batch, masks):
        found = [_fixed(num_tokens, ring, given), *_balanced(load, ring, SHORTEST)]
        costs = [load.cost(chunks) for chunks in found]
        even = [load.busiest(chunks) <= (1 + UNEVEN) * mean for chunks in found]
        worth = [cost < (1 - WORTH) * costs[0] for cost in costs]
        # Even deals first: a cost is an estimate of one machine's speeds, the work of the busiest rank is not.
        chosen = min(range(len(found)), key=lambda i: (not (even[i] and worth[i]), costs[i]))
        if worth[chosen]:
            return Dealt(BALANCED, _shards(found[chosen]))
    return Dealt(given, deal(num_tokens, ring, given))


def _is_packed(batch: int, masks: Sequence[Mask]) -> bool:
    """Whether some row holds several documents; padding is none."""
    return any(int((mask.documents.last > mask.documents.first).sum()) > batch for mask in masks)


class _Chunks(NamedTuple):
    """A row cut at `edges` [C + 1], and the ring rank that gets each chunk [C]. No chunk is empty."""

    edges: IntArray
    owner: IntArray
    ring: int


def _fixed(num_tokens: int, ring: int, order: str) -> _Chunks:
    """The chunks of one of `PATTERNS`."""
    ranks = np.arange(ring)
    owner = {"contiguous": ranks, "zigzag": np.concatenate((ranks, ranks[::-1]))}[order]
    sizes = [len(part) for part in np.array_split(np.empty(num_tokens, dtype=np.int8), len(owner))]
    return _filled(np.concatenate(([0], np.cumsum(sizes))), owner, ring)


def _filled(edges: IntArray, owner: IntArray, ring: int) -> _Chunks:
    filled = np.diff(edges) > 0
    return _Chunks(np.append(edges[:-1][filled], edges[-1]), owner[filled], ring)


def _shards(chunks: _Chunks) -> list[IntArray]:
    """Positions that each rank holds, ascending."""
    edges, owner, ring = chunks
    runs = [(edges[:-1][owner == rank], edges[1:][owner == rank]) for rank in range(ring)]
    return [np.concatenate([np.arange(a, b) for a, b in zip(*run, strict=True)]) for run in runs]


class _Load:
    """What chunks of a row cost, over all rows and layers."""

    def __init__(self, masks: Sequence[Mask], batch: int, num_tokens: int) -> None:
        self.masks, self.batch, self.num_tokens = Counter(masks), batch, num_tokens
        self.total = int(self.areas(np.array([0, num_tokens]))[0])

    def areas(self, edges: IntArray) -> IntArray:
        """Mask area of each chunk."""
        positions = (np.arange(self.batch)[:, None] * self.num_tokens + edges).ravel()
        before = sum(layers * mask.area_before(positions) for mask, layers in self.masks.items())
        return np.diff(np.asarray(before).reshape(self.batch, -1), axis=1).sum(0)

    def busiest(self, chunks: _Chunks) -> int:
        """Mask area of the rank that has most."""
        held = np.zeros(chunks.ring, dtype=np.int64)
        np.add.at(held, chunks.owner, self.areas(chunks.edges))
        return int(held.max())

    def cost(self, chunks: _Chunks) -> float:
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


def _balanced(load: _Load, ring: int, shortest: int) -> list[_Chunks]:
    """Even deals with 2, 4, ... chunks for each rank, up to the first whose busiest rank is near the mean."""
    dealt: list[_Chunks] = []
    for pieces in PIECES:
        size = load.num_tokens // (ring * pieces)
        if size < max(1, shortest) and dealt:
            break
        dealt.append(_deal_chunks(load, ring, max(1, size)))
        tries = min(EXCHANGES, LOOKS * ring // (load.batch * len(dealt[-1].owner) ** 3))
        if tries:
            dealt.append(_exchange(dealt[-1], load, tries))
        if min(load.busiest(chunks) for chunks in dealt[-2:]) <= (1 + UNEVEN) * load.total / ring:
            break
    return dealt


def _deal_chunks(load: _Load, ring: int, size: int) -> _Chunks:
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
    return _filled(edges, owner, ring)


def _exchange(chunks: _Chunks, load: _Load, tries: int) -> _Chunks:
    """The same chunks after exchanges of two each, which take keys that have to be fetched off the rank that is last.

    A rank's excess is what it fetches and the area above its allowance; an exchange lowers the sum of their squares.
    """
    edges, owner, ring = chunks.edges, chunks.owner.copy(), chunks.ring
    need, length, area = _needs(edges, load), np.diff(edges), load.areas(edges).astype(np.float64)
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
        # What they take they hold; all of them miss it now.
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
    return _Chunks(edges, owner, ring)


def _needs(edges: IntArray, load: _Load) -> IntArray:
    """What fetching would cost of each chunk (of each row) that the queries of a chunk see [C, batch * C]."""
    start, stop = edges[:-1], edges[1:]
    need = np.zeros((len(start), load.batch, len(start)))
    rows = np.arange(load.batch)[:, None] * load.num_tokens
    for mask, layers in load.masks.items():
        lo, hi = (x - rows for x in load.seen(edges, mask))
        overlap = np.minimum(hi[..., None], stop) - np.maximum(lo[..., None], start)
        need += PAIRS_PER_ROW * layers * np.maximum(overlap, 0).transpose(1, 0, 2)
    return need.reshape(len(start), -1)


def own_and_rest(shards: Sequence[IntArray], mask: Mask) -> tuple[IntArray, IntArray]:
    """Mask area per rank [R] over the keys that it holds, and over those that have to come from other ranks."""
    pairs = np.empty((2, len(shards)), dtype=np.int64)
    for rank, shard in enumerate(shards):
        runs, seen = find_runs(shard), mask.interval(shard)
        for i, (lo, hi) in enumerate((seen, [rows_before(runs, edge) for edge in seen])):
            pairs[i, rank] = np.maximum(hi - lo, 0).sum()
    return pairs[1], pairs[0] - pairs[1]


def balance(shards: Sequence[IntArray], mask: Mask) -> float:
    """Mean mask area per rank over the path of ranks that wait for each other: 1.0 is perfect, 1/ranks the worst.

    Every rank computes its own keys first and meets the others where their keys are needed, so the path is the
    largest share of own keys plus the largest share of the rest; work that is equal only in sum still waits.
    """
    own, rest = own_and_rest(shards, mask)
    path = own.max() + rest.max()
    return float((own + rest).mean() / path) if path else 1.0


def choose_order(batch: int, num_tokens: int, ring: int, masks: Sequence[Mask]) -> str:
    """The order whose busiest rank has the least work, summed over `masks` (one entry per layer).

    Where that differs by less than `WORTH`: the order in which ranks wait less (`balance`; a sliding window is better
    off contiguous), then the one that needs fewer foreign keys (documents aligned with shards need none), then zigzag.
    """
    if ring == 1:
        return "contiguous"

    def cost(order: str) -> tuple[int, ...]:
        shards = over_batch(deal(num_tokens, ring, order), batch, num_tokens)
        total = np.zeros(3, dtype=np.int64)
        for mask, layers in Counter(masks).items():  # layers that share a mask are worked out once
            own, rest = own_and_rest(shards, mask)
            total += layers * np.array([(own + rest).max(), own.max() + rest.max(), rest.sum()])
        return tuple(total.tolist())

    flat, folded = cost("contiguous"), cost("zigzag")
    if abs(flat[0] - folded[0]) > WORTH * max(flat[0], folded[0]):
        return "contiguous" if flat[0] < folded[0] else "zigzag"
    return "contiguous" if flat[1:] < folded[1:] else "zigzag"
