"""Which ring rank gets which tokens of a row, chosen for the masks of a batch. Integers only: no torch.

Contiguous and zigzag are fixed patterns. Packed documents of uneven length leave some ranks of either with up to three
times the mean work; there a row is cut into chunks, which are dealt so that all ranks get as many tokens and nearly the
same mask area, with the fewest chunks that achieve it (more chunks mean more keys to fetch).
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
        return min(_balanced(load, ring, 1), key=lambda dealt: _busiest(dealt.shards, load))
    flat = {name: _busiest(deal(num_tokens, ring, name), load) for name in ORDERS}
    if abs(flat["contiguous"] - flat["zigzag"]) > WORTH * max(flat.values()):
        best = min(flat, key=lambda name: flat[name])
    else:
        best = choose_order(batch, num_tokens, ring, masks)
    given = Dealt(best, deal(num_tokens, ring, best))
    if flat[best] <= (1 + UNEVEN) * mean:
        return given
    found = [given, *_balanced(load, ring, SHORTEST)]
    costs = [_cost(dealt.shards, load, masks, batch) for dealt in found]
    return found[int(np.argmin(costs))] if min(costs) < (1 - WORTH) * costs[0] else given


def _cumulated(masks: Sequence[Mask], batch: int, num_tokens: int) -> IntArray:
    """Mask area of the first n columns of all rows, over all layers [num_tokens + 1]."""
    area = np.zeros(batch * num_tokens, dtype=np.int64)
    for mask, layers in Counter(masks).items():
        lo, hi = mask.interval(np.arange(batch * num_tokens))
        area += layers * np.maximum(hi - lo, 0)
    return np.concatenate(([0], np.cumsum(area.reshape(batch, num_tokens).sum(0))))


def _balanced(load: IntArray, ring: int, shortest: int) -> list[Dealt]:
    """Even deals with 2, 4, ... chunks for each rank, up to the first whose busiest rank is near the mean."""
    num_tokens = len(load) - 1
    dealt: list[Dealt] = []
    for pieces in PIECES:
        size = num_tokens // (ring * pieces)
        if size < max(1, shortest) and dealt:
            break
        dealt.append(Dealt(BALANCED, _deal_chunks(load, ring, max(1, size))))
        if _busiest(dealt[-1].shards, load) <= (1 + UNEVEN) * load[-1] / ring:
            break
    return dealt


def _deal_chunks(load: IntArray, ring: int, size: int) -> list[IntArray]:
    """Chunks of `size` tokens, heaviest first, `ring` at a time: the heaviest of them to the rank with the least."""
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
    by_token = np.repeat(owner, np.diff(edges))
    return [np.flatnonzero(by_token == rank) for rank in range(ring)]


def _runs(shard: IntArray) -> tuple[IntArray, IntArray]:
    """First and last position of each run of consecutive positions."""
    breaks = np.flatnonzero(np.diff(shard) != 1)
    return shard[np.append(0, breaks + 1)], shard[np.append(breaks, len(shard) - 1)]


def _busiest(shards: Sequence[IntArray], load: IntArray) -> int:
    """Mask area of the rank that has most."""
    areas = []
    for shard in shards:
        first, last = _runs(shard)
        areas.append(int((load[last + 1] - load[first]).sum()))
    return max(areas)


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
