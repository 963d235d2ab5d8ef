"""Who holds which token, and who looks at whom. Integers only: no torch.

The one idea: **a query sees one interval of keys.** Causal, packed documents, sliding windows, chunks, padding, both
directions: each only clips that interval (`Mask.interval`). Shards keep their tokens in ascending order, so between
any two shards a query still sees one interval of *local* key rows (`visible`). A run of queries whose intervals grow
like a band is a tile (`cut_tiles`), and a tile is exactly one segment of a variable-length flash-attention call.

Positions are global and flattened over the batch: row b of a batch of rows of S tokens holds b*S .. b*S + S - 1.
A batch is a pack of its rows. Windows follow flash-attention: ``left`` / ``right`` count the keys before / after the
diagonal that ends in the bottom right corner of the tile; -1 means no limit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .errors import UspBatchError, UspConfigError, UspMaskError

UNLIMITED = -1
ORDERS = ("contiguous", "zigzag")
# Share of the busiest rank's work that is worth waiting or moving more for.
WORTH = 0.01
IntArray = np.ndarray


@dataclass(frozen=True, eq=False)
class Documents:
    """Consecutive groups of tokens that see only each other.

    bounds [N + 1]: document i holds the positions bounds[i] .. bounds[i + 1] - 1.
    first, last [N]: its visible keys are first[i] .. last[i] - 1. They are fewer than its tokens where keys are
    padding, and none (first == last) where nothing is to be computed.
    """

    bounds: IntArray
    first: IntArray
    last: IntArray

    def __post_init__(self) -> None:
        start, stop = self.bounds[:-1], self.bounds[1:]
        fits = len(start) == len(self.first) == len(self.last) and len(self.bounds) > 0 and self.bounds[0] == 0
        if not (fits and bool(((start <= self.first) & (self.first <= self.last) & (self.last <= stop)).all())):
            raise UspBatchError(
                f"documents with bounds {self.bounds}, visible keys from {self.first} to {self.last}",
                rule="bounds begin at 0 and never fall, and the visible keys of a document lie inside it",
            )

    @classmethod
    def from_bounds(cls, bounds: Sequence[int] | IntArray) -> Documents:
        """Documents without padding: every token is a visible key."""
        edges = np.asarray(bounds, dtype=np.int64)
        return cls(edges, edges[:-1], edges[1:])

    @property
    def num_tokens(self) -> int:
        return int(self.bounds[-1])

    def chunked(self, size: int, row: int = 0) -> Documents:
        """Each document cut into chunks of `size` tokens, counted from its first visible key (Llama 4).

        With a `row` length documents inside a row count their chunks from the row's first token.
        """
        if size < 1:
            raise UspMaskError(f"chunks of {size} tokens", rule="a chunk holds at least one token")
        starts, stops = self.bounds[:-1], self.bounds[1:]
        origin = np.maximum(self.first, starts)
        if row:
            origin = np.where(starts % row == 0, origin, starts - starts % row)
        following = np.minimum(origin + size * (np.maximum(starts - origin, 0) // size + 1), stops)
        cuts = [
            np.concatenate(([start], np.arange(cut, stop, size)))
            for start, cut, stop in zip(starts, following, stops, strict=True)
        ]
        owner = np.repeat(np.arange(len(cuts)), [len(c) for c in cuts])
        starts = np.concatenate(cuts).astype(np.int64)
        bounds = np.append(starts, self.bounds[-1])
        first = np.maximum(self.first[owner], bounds[:-1])
        last = np.maximum(np.minimum(self.last[owner], bounds[1:]), first)
        return Documents(bounds, first, last)


@dataclass(frozen=True, eq=False)
class Mask:
    """A query at position i sees the visible keys of its own document in [i - left, i + right]."""

    documents: Documents
    left: int = UNLIMITED
    right: int = 0

    def __post_init__(self) -> None:
        if self.left < UNLIMITED or self.right < UNLIMITED:
            raise UspMaskError(
                f"a window of {self.left} keys before and {self.right} after the query",
                rule=f"a window counts keys: 0 or more, or {UNLIMITED} for no limit",
            )

    def interval(self, positions: IntArray) -> tuple[IntArray, IntArray]:
        """First and past-the-last visible global position of each query; equal or crossed where it sees nothing.

        `positions` ascend, so documents are looked up among positions and not the other way around.
        """
        docs = self.documents
        counts = np.diff(np.searchsorted(positions, docs.bounds))
        lo, hi = np.repeat(docs.first, counts), np.repeat(docs.last, counts)
        if self.left != UNLIMITED:
            lo = np.maximum(lo, positions - self.left)
        if self.right != UNLIMITED:
            hi = np.minimum(hi, positions + self.right + 1)
        return lo, hi

    def area(self, positions: IntArray) -> int:
        """Number of (query, key) pairs that these queries see."""
        lo, hi = self.interval(positions)
        return _overlap(lo, hi)


class Tiles(NamedTuple):
    """Bands of one shard pair, one entry per tile: queries q0..q1-1 against keys k0..k1-1 under a window."""

    q0: IntArray
    q1: IntArray
    k0: IntArray
    k1: IntArray
    left: IntArray
    right: IntArray

    def area(self) -> int:
        """Number of (query, key) pairs inside the bands."""
        lq, lk = self.q1 - self.q0, self.k1 - self.k0
        # Row i of a tile sees columns max(0, i + lk - lq - left) .. min(lk, i + lk - lq + right + 1) - 1. The columns
        # hidden to the right of (or left of) the band form a triangle that shrinks by one a row.
        hidden_right = np.where(self.right == UNLIMITED, 0, lq - 1 - self.right)
        hidden_left = np.where(self.left == UNLIMITED, 0, lk - 1 - self.left)
        triangle = hidden_right * (hidden_right + 1) // 2 + hidden_left * (hidden_left + 1) // 2
        return int((lq * lk - triangle).sum())


def contiguous(num_tokens: int, ring: int) -> list[IntArray]:
    """Rank r holds the r-th of `ring` equal slices."""
    return np.array_split(np.arange(num_tokens), ring)


def zigzag(num_tokens: int, ring: int) -> list[IntArray]:
    """Rank r holds chunks r and 2*ring-1-r: an early one and a late one, so causal work is equal."""
    chunks = np.array_split(np.arange(num_tokens), 2 * ring)
    return [np.concatenate((chunks[r], chunks[2 * ring - 1 - r])) for r in range(ring)]


def deal(num_tokens: int, ring: int, order: str) -> list[IntArray]:
    """Positions of one row that each ring rank holds, ascending. `order` is one of `ORDERS`."""
    if order not in ORDERS:
        raise UspConfigError(
            f"sequence_order={order!r}",
            rule=f"a fixed order is one of {', '.join(ORDERS)}",
            remedy="use sequence_order='auto', which takes the better balanced one",
        )
    if ring < 1:
        raise UspConfigError(f"a ring of {ring} ranks", rule="a ring has at least one rank")
    return contiguous(num_tokens, ring) if order == "contiguous" else zigzag(num_tokens, ring)


def over_batch(shards: Sequence[IntArray], batch: int, num_tokens: int) -> list[IntArray]:
    """The same assignment for every row of a batch, as flattened ascending positions."""
    rows = np.arange(batch)[:, None] * num_tokens
    return [(rows + shard).ravel() for shard in shards]


def own_and_rest(shards: Sequence[IntArray], mask: Mask) -> tuple[IntArray, IntArray]:
    """Mask area per rank [R] over the keys that it holds, and over those that have to come from other ranks."""
    own = [_overlap(*visible(shard, shard, mask)) for shard in shards]
    return np.array(own), np.array([mask.area(shard) for shard in shards]) - own


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


def _overlap(lo: IntArray, hi: IntArray) -> int:
    return int(np.maximum(hi - lo, 0).sum())


def visible(q_pos: IntArray, k_pos: IntArray, mask: Mask) -> tuple[IntArray, IntArray]:
    """Interval of local key rows that each local query row sees on a shard holding `k_pos` (hi <= lo: nothing)."""
    lo, hi = mask.interval(q_pos)
    return _rows_before(k_pos, lo), _rows_before(k_pos, hi)


def _rows_before(k_pos: IntArray, positions: IntArray) -> IntArray:
    """How many of the ascending `k_pos` come before each position: a lookup among their few runs."""
    if len(k_pos) == 0:
        return np.zeros_like(positions)
    row = np.concatenate(([0], np.flatnonzero(np.diff(k_pos) != 1) + 1))  # where a run of consecutive keys begins
    length = np.diff(np.append(row, len(k_pos)))
    run = np.searchsorted(k_pos[row], positions, side="right") - 1
    inside = np.minimum(positions - k_pos[row][run], length[run])
    return np.where(run < 0, 0, row[run] + inside)


def needed_rows(lo: IntArray, hi: IntArray, num_keys: int) -> IntArray:
    """Key rows that at least one query sees, as sorted disjoint intervals [M, 2]."""
    alive = hi > lo
    depth = np.bincount(lo[alive], minlength=num_keys + 1) - np.bincount(hi[alive], minlength=num_keys + 1)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], np.cumsum(depth[:-1]) > 0, [0])).astype(np.int8)))
    return edges.reshape(-1, 2)


def compact(lo: IntArray, hi: IntArray, rows: IntArray) -> tuple[IntArray, IntArray]:
    """The same intervals counted in a buffer that holds only `rows` (as `needed_rows` gives them)."""
    alive = hi > lo
    lengths = rows[:, 1] - rows[:, 0]
    offsets = np.cumsum(lengths) - lengths
    span = np.searchsorted(rows[:, 0], lo[alive], side="right") - 1
    new_lo = np.zeros_like(lo)
    new_lo[alive] = lo[alive] - rows[span, 0] + offsets[span]
    return new_lo, np.where(alive, new_lo + hi - lo, new_lo)


def cut_tiles(lo: IntArray, hi: IntArray) -> Tiles:
    """The fewest bands that cover the visible intervals; each query that sees something is in exactly one.

    Inside a band both edges move by at most one key a row; the lower edge may stand still and then climb, the upper
    edge climb and then stand still. Anything else (a jump, a row that sees nothing) starts a new band.
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
