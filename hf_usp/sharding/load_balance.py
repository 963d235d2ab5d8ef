"""Load balancing: which ring rank holds which tokens of a row. Integers only: no torch.

Eight tokens under a causal mask. Rows are queries, columns are keys. A number is the ring rank that computes the pair;
a dot is masked. Two ranks hold four tokens each.

    contiguous: rank 0 holds 0-3             zigzag: rank 0 holds 0, 1, 6, 7

         0 1 2 3 4 5 6 7                          0 1 2 3 4 5 6 7
      0  0 . . . . . . .                       0  0 . . . . . . .
      1  0 0 . . . . . .                       1  0 0 . . . . . .
      2  0 0 0 . . . . .                       2  1 1 1 . . . . .
      3  0 0 0 0 . . . .                       3  1 1 1 1 . . . .
      4  1 1 1 1 1 . . .                       4  1 1 1 1 1 . . .
      5  1 1 1 1 1 1 . .                       5  1 1 1 1 1 1 . .
      6  1 1 1 1 1 1 1 .                       6  0 0 0 0 0 0 0 .
      7  1 1 1 1 1 1 1 1                       7  0 0 0 0 0 0 0 0

    pairs: rank 0 10, rank 1 26              pairs: rank 0 18, rank 1 18

A query is computed by the rank that holds it; the keys of other ranks are sent to it. "balanced" splits a row into
more chunks and assigns them by their work; packed documents of uneven length need it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import UspConfigError
from .balance_search import UNEVEN, Chunks, MaskLoad, balanced_assignments, without_empty
from .intervals import IntArray, find_runs, rows_before
from .masks import Mask

ORDERS = ("contiguous", "zigzag")


def contiguous(num_tokens: int, ring: int) -> list[IntArray]:
    """Rank r holds the r-th of `ring` equal slices.

    >>> [shard.tolist() for shard in contiguous(8, 2)]
    [[0, 1, 2, 3], [4, 5, 6, 7]]
    """
    return np.array_split(np.arange(num_tokens), ring)


def zigzag(num_tokens: int, ring: int) -> list[IntArray]:
    """Rank r holds chunks r and 2*ring-1-r: an early one and a late one, so causal work is equal.

    >>> [shard.tolist() for shard in zigzag(8, 2)]
    [[0, 1, 6, 7], [2, 3, 4, 5]]
    """
    chunks = np.array_split(np.arange(num_tokens), 2 * ring)
    return [np.concatenate((chunks[r], chunks[2 * ring - 1 - r])) for r in range(ring)]


def fixed_assignment(num_tokens: int, ring: int, order: str) -> list[IntArray]:
    """Positions of one row that each ring rank holds, ascending. `order` is one of `ORDERS`.

    Raises `UspConfigError` for another order, and for a ring of no ranks.

    >>> [shard.tolist() for shard in fixed_assignment(8, 4, "zigzag")]
    [[0, 7], [1, 6], [2, 5], [3, 4]]
    """
    if order not in ORDERS:
        raise UspConfigError(
            f"sequence_order={order!r}",
            rule=f"a fixed order is one of {', '.join(ORDERS)}",
            remedy="use sequence_order='auto', which takes the better balanced one",
        )
    if ring < 1:
        raise UspConfigError(
            f"a ring of {ring} ranks", rule="a ring has at least one rank", remedy="pass a ring_degree of 1 or more"
        )
    return contiguous(num_tokens, ring) if order == "contiguous" else zigzag(num_tokens, ring)


def over_batch(shards: Sequence[IntArray], batch: int, num_tokens: int) -> list[IntArray]:
    """The same assignment for every row of a batch, as flattened ascending positions.

    >>> [shard.tolist() for shard in over_batch([np.array([0, 3]), np.array([1, 2])], batch=2, num_tokens=4)]
    [[0, 3, 4, 7], [1, 2, 5, 6]]
    """
    rows = np.arange(batch)[:, None] * num_tokens
    return [(rows + shard).ravel() for shard in shards]


BALANCED = "balanced"


ALL_ORDERS = (*ORDERS, BALANCED)


# The fixed orders that "auto" chooses from; others are taken where they are asked for by name.
PATTERNS = ("contiguous", "zigzag")


SHORTEST = 128


# Share of the busiest rank's work that is worth waiting or moving more for.
WORTH = 0.01


class Assignment(NamedTuple):
    """An assignment of the tokens of a row to ring ranks.

    Attributes:
        order: its name, one of `ALL_ORDERS`.
        shards: positions that each ring rank holds, ascending.
    """

    order: str
    shards: list[IntArray]


def assign_tokens(batch: int, num_tokens: int, ring: int, order: str, masks: Sequence[Mask]) -> Assignment:
    """Assign the tokens of each of `batch` rows to `ring` ranks, the same way in every row.

    Args:
        batch: number of rows.
        num_tokens: tokens of a row (a multiple of `ring`).
        ring: number of ring ranks.
        order: one of `ALL_ORDERS`, or "auto": contiguous or zigzag where the better one is even (`choose_order`),
            balanced where that costs less. A row of one document always gets a fixed order: a sliding window then
            sends its halo and no more.
        masks: over the full batch, one entry per layer.

    Raises:
        UspConfigError: an unknown order.

    A causal mask over one document gets zigzag; documents of 6 and 2 tokens are balanced:

    >>> from .masks import Documents
    >>> assign_tokens(1, 8, 2, "auto", [Mask(Documents.from_bounds([0, 8]))]).order
    'zigzag'
    >>> found = assign_tokens(1, 8, 2, "balanced", [Mask(Documents.from_bounds([0, 6, 8]))])
    >>> [shard.tolist() for shard in found.shards]  # 1 + 2 + 3 + 6 pairs each
    [[0, 1, 2, 5], [3, 4, 6, 7]]
    """
    if order not in ("auto", *ALL_ORDERS):
        raise UspConfigError(
            f"sequence_order={order!r}", rule=f"an order is one of auto, {', '.join(ALL_ORDERS)}", remedy="use 'auto'"
        )
    if order in ORDERS or ring == 1:
        order = order if order in ORDERS else "contiguous"
        return Assignment(order, fixed_assignment(num_tokens, ring, order))
    load = MaskLoad(masks, batch, num_tokens)
    mean = load.total / ring
    if order == BALANCED:
        tried = balanced_assignments(load, ring, 1)
        near = [chunks for chunks in tried if load.busiest(chunks) <= (1 + UNEVEN) * mean]
        best = min(near, key=load.cost) if near else min(tried, key=load.busiest)
        return Assignment(BALANCED, _shards(best))
    flat = {name: load.busiest(_fixed(num_tokens, ring, name)) for name in PATTERNS}
    if abs(flat["contiguous"] - flat["zigzag"]) > WORTH * max(flat.values()):
        given = min(flat, key=lambda name: flat[name])
    elif min(flat.values()) <= (1 + UNEVEN) * mean:
        given = choose_order(batch, num_tokens, ring, masks)
    else:
        given = min(PATTERNS, key=lambda name: load.cost(_fixed(num_tokens, ring, name)))
    if flat[given] > (1 + UNEVEN) * mean and _is_packed(batch, masks):
        found = [_fixed(num_tokens, ring, given), *balanced_assignments(load, ring, SHORTEST)]
        costs = [load.cost(chunks) for chunks in found]
        even = [load.busiest(chunks) <= (1 + UNEVEN) * mean for chunks in found]
        worth = [cost < (1 - WORTH) * costs[0] for cost in costs]
        # Even assignments first: a cost is an estimate of one machine's speeds, the work of the busiest rank is not.
        chosen = min(range(len(found)), key=lambda i: (not (even[i] and worth[i]), costs[i]))
        if worth[chosen]:
            return Assignment(BALANCED, _shards(found[chosen]))
    return Assignment(given, fixed_assignment(num_tokens, ring, given))


def _is_packed(batch: int, masks: Sequence[Mask]) -> bool:
    """Whether some row holds several documents; padding is none."""
    return any(int((mask.documents.last > mask.documents.first).sum()) > batch for mask in masks)


def _fixed(num_tokens: int, ring: int, order: str) -> Chunks:
    """The chunks of one of `PATTERNS`."""
    ranks = np.arange(ring)
    owner = {"contiguous": ranks, "zigzag": np.concatenate((ranks, ranks[::-1]))}[order]
    sizes = [len(part) for part in np.array_split(np.empty(num_tokens, dtype=np.int8), len(owner))]
    return without_empty(np.concatenate(([0], np.cumsum(sizes))), owner, ring)


def _shards(chunks: Chunks) -> list[IntArray]:
    """Positions that each rank holds, ascending."""
    edges, owner, ring = chunks
    runs = [(edges[:-1][owner == rank], edges[1:][owner == rank]) for rank in range(ring)]
    return [np.concatenate([np.arange(a, b) for a, b in zip(*run, strict=True)]) for run in runs]


def own_and_rest(shards: Sequence[IntArray], mask: Mask) -> tuple[IntArray, IntArray]:
    """Mask area per rank [R] over the keys that it holds, and over the keys that other ranks send it.

    >>> from .masks import Documents
    >>> own, rest = own_and_rest(zigzag(8, 2), Mask(Documents.from_bounds([0, 8])))
    >>> own.tolist(), rest.tolist()
    ([10, 10], [8, 8])
    """
    pairs = np.empty((2, len(shards)), dtype=np.int64)
    for rank, shard in enumerate(shards):
        runs, seen = find_runs(shard), mask.interval(shard)
        for i, (lo, hi) in enumerate((seen, [rows_before(runs, edge) for edge in seen])):
            pairs[i, rank] = np.maximum(hi - lo, 0).sum()
    return pairs[1], pairs[0] - pairs[1]


def balance(shards: Sequence[IntArray], mask: Mask) -> float:
    """Mean mask area per rank over the path of ranks that wait for each other: 1.0 is perfect, 1/ranks the worst.

    Every rank computes with its own keys first and then waits for keys of others. So the path is the largest area over
    own keys plus the largest area over the rest; ranks whose areas are equal only in sum still wait.

    >>> from .masks import Documents
    >>> mask = Mask(Documents.from_bounds([0, 8]))
    >>> round(balance(contiguous(8, 2), mask), 3), balance(zigzag(8, 2), mask)  # 18 / (10 + 16), 18 / (10 + 8)
    (0.692, 1.0)
    """
    own, rest = own_and_rest(shards, mask)
    path = own.max() + rest.max()
    return float((own + rest).mean() / path) if path else 1.0


def choose_order(batch: int, num_tokens: int, ring: int, masks: Sequence[Mask]) -> str:
    """The order whose busiest rank has the least work, summed over `masks` (one entry per layer).

    Where that differs by less than `WORTH`: the order in which ranks wait less (`balance`; contiguous for a sliding
    window), then the one that fetches fewer keys (documents aligned with shards fetch none), then zigzag.

    >>> from .masks import Documents
    >>> document = Documents.from_bounds([0, 64])
    >>> choose_order(1, 64, 4, [Mask(document)]), choose_order(1, 64, 4, [Mask(document, left=3)])
    ('zigzag', 'contiguous')
    """
    if ring == 1:
        return "contiguous"

    def cost(order: str) -> tuple[int, ...]:
        shards = over_batch(fixed_assignment(num_tokens, ring, order), batch, num_tokens)
        total = np.zeros(3, dtype=np.int64)
        for mask, layers in Counter(masks).items():  # layers that share a mask are worked out once
            own, rest = own_and_rest(shards, mask)
            total += layers * np.array([(own + rest).max(), own.max() + rest.max(), rest.sum()])
        return tuple(total.tolist())

    flat, folded = cost("contiguous"), cost("zigzag")
    if abs(flat[0] - folded[0]) > WORTH * max(flat[0], folded[0]):
        return "contiguous" if flat[0] < folded[0] else "zigzag"
    return "contiguous" if flat[1:] < folded[1:] else "zigzag"
