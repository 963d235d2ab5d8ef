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

from .errors import UspConfigError
from .layout import ORDERS, WORTH, IntArray, Mask, choose_order, deal

BALANCED = "balanced"
ALL_ORDERS = (*ORDERS, BALANCED)
# Chunks for each ring rank that are tried, and the shortest that is worth a kernel call of its own.
PIECES = (2, 4, 8, 16, 32, 64)
SHORTEST = 128
# A rank may have this share more than the mean before tokens are dealt otherwise.
UNEVEN = 0.05
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
            balanced where that costs less.
        masks: over the whole batch, one entry per layer.
    """
    if order not in ("auto", *ALL_ORDERS):
        raise UspConfigError(
            f"sequence_order={order!r}", rule=f"an order is one of auto, {', '.join(ALL_ORDERS)}", remedy="use 'auto'"
        )
    if order in ORDERS or ring == 1:
        order = order if order in ORDERS else "contiguous"
        return Dealt(order, deal(num_tokens, ring, order))
    load = _cumulated(masks, batch, num_tokens)
    mean = load[-1] / ring
    if order == BALANCED:
        tried = _balanced(load, ring, 1, masks, batch)
        even = [dealt for dealt in tried if _busiest(dealt.shards, load) <= (1 + UNEVEN) * mean]
        if even:
            return min(even, key=lambda dealt: _cost(dealt.shards, load, masks, batch))
        return min(tried, key=lambda dealt: _busiest(dealt.shards, load))
    flat = {name: _busiest(deal(num_tokens, ring, name), load) for name in ORDERS}
    if abs(flat["contiguous"] - flat["zigzag"]) > WORTH * max(flat.values()):
        best = min(flat, key=lambda name: flat[name])
    else:
        best = choose_order(batch, num_tokens, ring, masks)
    given = Dealt(best, deal(num_tokens, ring, best))
    if flat[best] <= (1 + UNEVEN) * mean:
        return given
    found = [given, *_balanced(load, ring, SHORTEST, masks, batch)]
    costs = [_cost(dealt.shards, load, masks, batch) for dealt in found]
    even = [_busiest(dealt.shards, load) <= (1 + UNEVEN) * mean for dealt in found]
    worth = [cost < (1 - WORTH) * costs[0] for cost in costs]
    # Even deals first: a cost is an estimate of one machine's speeds, the work of the busiest rank is not.
    chosen = min(range(len(found)), key=lambda i: (not (even[i] and worth[i]), costs[i]))
    return found[chosen] if worth[chosen] else given


def _cumulated(masks: Sequence[Mask], batch: int, num_tokens: int) -> IntArray:
    """Mask area of the first n columns of all rows, over all layers [num_tokens + 1]."""
    area = np.zeros(batch * num_tokens, dtype=np.int64)
    for mask, layers in Counter(masks).items():
        lo, hi = mask.interval(np.arange(batch * num_tokens))
        area += layers * np.maximum(hi - lo, 0)
    return np.concatenate(([0], np.cumsum(area.reshape(batch, num_tokens).sum(0))))


def _balanced(load: IntArray, ring: int, shortest: int, masks: Sequence[Mask], batch: int) -> list[Dealt]:
    """Even deals with 2, 4, ... chunks for each rank, up to the first whose busiest rank is near the mean."""
    num_tokens = len(load) - 1
    dealt: list[Dealt] = []
    for pieces in PIECES:
        size = num_tokens // (ring * pieces)
        if size < max(1, shortest) and dealt:
            break
        edges, owner = _deal_chunks(load, ring, max(1, size))
        first = _shards(edges, owner, ring)
        dealt.append(Dealt(BALANCED, first))
        tries = min(EXCHANGES, LOOKS * ring // (batch * len(owner) ** 3))
        if tries:
            dealt.append(Dealt(BALANCED, _shards(edges, _exchange(edges, owner, load, masks, batch, tries), ring)))
        if min(_busiest(deal.shards, load) for deal in dealt[-2:]) <= (1 + UNEVEN) * load[-1] / ring:
            break
    return dealt


def _shards(edges: IntArray, owner: IntArray, ring: int) -> list[IntArray]:
    """Positions that each rank holds, ascending."""
    runs = [(edges[:-1][owner == rank], edges[1:][owner == rank]) for rank in range(ring)]
    return [np.concatenate([np.arange(a, b) for a, b in zip(*run, strict=True)]) for run in runs]


def _deal_chunks(load: IntArray, ring: int, size: int) -> tuple[IntArray, IntArray]:
    """Chunks of `size` tokens, heaviest first, `ring` at a time: the heaviest of them to the rank with the least.

    Returns the edges of the chunks and the rank that gets each.
    """
    num_tokens = len(load) - 1
    rounds = num_tokens // (ring * size)
    rest = (num_tokens - rounds * ring * size) // ring  # the last tokens, one short chunk for each rank
    edges = np.concatenate((np.arange(rounds * ring) * size, rounds * ring * size + np.arange(ring + 1) * rest))
    weight = np.diff(load[edges])
    owner, held = np.empty(len(weight), dtype=np.int64), np.zeros(ring, dtype=np.int64)
    by_weight = np.argsort(-weight[: rounds * ring], kind="stable").reshape(rounds, ring)
    for together in (*by_weight, np.argsort(-weight[rounds * ring :], kind="stable") + rounds * ring):
        lightest = np.argsort(held, kind="stable")
        owner[together] = lightest
        held[lightest] += weight[together]
    return edges, owner


def _exchange(
    edges: IntArray, owner: IntArray, load: IntArray, masks: Sequence[Mask], batch: int, tries: int
) -> IntArray:
    """Owners after exchanges of two chunks each, which take keys that have to be fetched off the rank that is last.

    A rank's excess is what it fetches and the area above its allowance; an exchange lowers the sum of their squares.
    """
    owner, need, length = owner.copy(), _needs(edges, masks, batch), np.diff(edges)
    area, ring = np.diff(load[edges]).astype(np.float64), int(owner.max()) + 1
    allowance = (1 + 0.8 * UNEVEN) * area.sum() / ring
    columns = np.tile(np.arange(len(owner)), need.shape[1] // len(owner))
    held = np.bincount(owner, weights=area, minlength=ring)
    # Of each chunk: what the other chunks of its rank need of every chunk, and which chunks those do not hold.
    rest, foreign = np.empty_like(need), np.empty(need.shape, dtype=bool)
    excess = np.empty(ring)

    def update(rank: int) -> None:
        mine = np.flatnonzero(owner == rank)
        largest = np.sort(np.concatenate((need[mine], np.zeros((2, need.shape[1])))), axis=0)[-2:]
        rest[mine] = np.where(need[mine] == largest[1], largest[0], largest[1])
        outside = ~np.isin(columns, mine)
        foreign[mine] = outside | (columns == mine[:, None])
        excess[rank] = max(held[rank] - allowance, 0.0) + largest[1][outside].sum()

    def after(give: IntArray, take: IntArray) -> IntArray:
        """Excess of the ranks of `give` [G, T] when they get chunks `take` for them."""
        fetched = np.maximum(rest[give][:, None], need[take][None])
        fetched *= foreign[give][:, None] & (columns != take[:, None])[None]
        there = held[owner[give]][:, None] + area[take] - area[give][:, None]
        return np.maximum(there - allowance, 0.0) + fetched.sum(-1)

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
    return owner


def _needs(edges: IntArray, masks: Sequence[Mask], batch: int) -> IntArray:
    """What fetching would cost of each chunk (of each row) that the queries of a chunk see [chunks, batch * chunks]."""
    num_tokens, chunks = int(edges[-1]), len(edges) - 1
    need = np.zeros((chunks, batch, chunks))
    start, stop = edges[:-1], edges[1:]
    filled = stop > start
    for mask, layers in Counter(masks).items():
        for row in range(batch):
            lo, hi = np.zeros(chunks, dtype=np.int64), np.zeros(chunks, dtype=np.int64)
            lo[filled] = mask.interval(row * num_tokens + start[filled])[0] - row * num_tokens
            hi[filled] = mask.interval(row * num_tokens + stop[filled] - 1)[1] - row * num_tokens
            seen = np.minimum(hi[:, None], stop) - np.maximum(lo[:, None], start)
            need[:, row] += PAIRS_PER_ROW * layers * np.maximum(seen, 0)
    return need.reshape(chunks, batch * chunks)


def _runs(shard: IntArray) -> tuple[IntArray, IntArray]:
    """First and last position of each run of consecutive positions."""
    breaks = np.flatnonzero(np.diff(shard) != 1)
    return shard[np.append(0, breaks + 1)], shard[np.append(breaks, len(shard) - 1)]


def _busiest(shards: Sequence[IntArray], load: IntArray) -> int:
    """Mask area of the rank that has most."""
    runs = [_runs(shard) for shard in shards]
    return max(int((load[last + 1] - load[first]).sum()) for first, last in runs)


def _cost(shards: Sequence[IntArray], load: IntArray, masks: Sequence[Mask], batch: int) -> float:
    """Area of the busiest rank, and what the rank that fetches most could have computed meanwhile."""
    num_tokens, fetched = len(load) - 1, np.zeros(len(shards))
    for mask, layers in Counter(masks).items():
        for rank, shard in enumerate(shards):
            first, last = (np.add.outer(np.arange(batch) * num_tokens, ends).ravel() for ends in _runs(shard))
            lo, hi = mask.interval(first)[0], mask.interval(last)[1]
            reached = np.concatenate(([0], np.maximum.accumulate(hi)[:-1]))
            needed = np.maximum(hi - np.maximum(lo, reached), 0).sum()
            fetched[rank] += layers * max(0, needed - batch * len(shard))
    return _busiest(shards, load) + PAIRS_PER_ROW * float(fetched.max())
