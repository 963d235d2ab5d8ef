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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import UspBatchError, UspConfigError, UspMaskError

UNLIMITED = -1
ORDERS = ("contiguous", "zigzag")
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
                remedy="call Documents.from_bounds with [0, end of the first document, ..., number of tokens]",
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
            raise UspMaskError(
                f"chunks of {size} tokens", rule="a chunk holds a token", remedy="set attention_chunk_size to 1 or more"
            )
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
                remedy="set the config's sliding_window to 1 or more (the query counts), or to None",
            )

    def interval(self, positions: IntArray) -> tuple[IntArray, IntArray]:
        """First and past-the-last visible global position of each query; equal or crossed where it sees nothing.

        `positions` ascend, so where they are many, documents are looked up among them and not the other way around.
        """
        docs = self.documents
        if len(positions) > len(docs.first):
            counts = np.diff(np.searchsorted(positions, docs.bounds))
            lo, hi = np.repeat(docs.first, counts), np.repeat(docs.last, counts)
        else:
            document = np.searchsorted(docs.bounds, positions, side="right") - 1
            lo, hi = docs.first[document], docs.last[document]
        if self.left != UNLIMITED:
            lo = np.maximum(lo, positions - self.left)
        if self.right != UNLIMITED:
            hi = np.minimum(hi, positions + self.right + 1)
        return lo, hi

    def reach(self, queries: Runs) -> IntArray:
        """Global positions that at least one of these queries sees, as sorted disjoint intervals [M, 2].

        Worked out for runs inside a document: there intervals of neighbours overlap or touch.
        """
        docs = self.documents
        begin = np.searchsorted(docs.bounds, queries.start, side="right") - 1
        counts = np.searchsorted(docs.bounds, queries.stop, side="left") - begin
        document = np.arange(counts.sum()) + np.repeat(begin - np.cumsum(counts) + counts, counts)
        start = np.maximum(docs.bounds[document], np.repeat(queries.start, counts))
        stop = np.minimum(docs.bounds[document + 1], np.repeat(queries.stop, counts))
        lo, hi = docs.first[document], docs.last[document]
        if self.left != UNLIMITED:
            lo = np.maximum(lo, start - self.left)
        if self.right != UNLIMITED:
            hi = np.minimum(hi, stop + self.right)
        return needed_rows(lo, np.where(start < stop, hi, lo))

    def area(self, positions: IntArray) -> int:
        """Number of (query, key) pairs that these queries see."""
        runs = find_runs(positions)
        return int((self.area_before(runs.stop) - self.area_before(runs.start)).sum())

    def area_before(self, positions: IntArray) -> IntArray:
        """Number of (query, key) pairs of all queries before each of the ascending `positions`."""
        docs = self.documents
        lengths = np.diff(docs.bounds)
        before = np.concatenate(([0], np.cumsum(self._pairs(lengths, docs.bounds[:-1], docs.first, docs.last))))
        document = np.minimum(np.searchsorted(docs.bounds, positions, side="right"), len(lengths)) - 1
        start = docs.bounds[document]
        return before[document] + self._pairs(positions - start, start, docs.first[document], docs.last[document])

    def _pairs(self, count: IntArray, start: IntArray, first: IntArray, last: IntArray) -> IntArray:
        """What the first `count` queries from `start` on see of the keys from `first` to `last`."""
        keys = last - first

        def up_to(diagonal: int) -> IntArray:
            """Pairs whose key is at most `diagonal` after the query."""
            ends = start + diagonal + 1 - first  # keys of the first query, were there enough
            return _triangle(ends + count, keys) - _triangle(ends, keys)

        right = count * keys if self.right == UNLIMITED else up_to(self.right)
        return right if self.left == UNLIMITED else right - up_to(-self.left - 1)


def _triangle(rows: IntArray, most: IntArray) -> IntArray:
    """Sum of 0, 1, 2, ... over `rows` rows, no term larger than `most`."""
    rows = np.maximum(rows, 0)
    beyond = np.maximum(rows - most, 0)
    return (rows * (rows - 1) - beyond * (beyond - 1)) // 2


class Runs(NamedTuple):
    """Runs of consecutive positions in a shard: the first, the one past the last, and the row of the first."""

    start: IntArray
    stop: IntArray
    row: IntArray


def find_runs(shard: IntArray) -> Runs:
    """The runs of ascending positions."""
    row = np.flatnonzero(np.concatenate(([True], shard[1:] - shard[:-1] != 1))[: len(shard)])
    start = shard[row]
    return Runs(start, start + np.diff(np.append(row, len(shard))), row)


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
        raise UspConfigError(
            f"a ring of {ring} ranks", rule="a ring has at least one rank", remedy="pass a ring_degree of 1 or more"
        )
    return contiguous(num_tokens, ring) if order == "contiguous" else zigzag(num_tokens, ring)


def over_batch(shards: Sequence[IntArray], batch: int, num_tokens: int) -> list[IntArray]:
    """The same assignment for every row of a batch, as flattened ascending positions."""
    rows = np.arange(batch)[:, None] * num_tokens
    return [(rows + shard).ravel() for shard in shards]


def visible(q_pos: IntArray, k_pos: IntArray, mask: Mask) -> tuple[IntArray, IntArray]:
    """Interval of local key rows that each local query row sees on a shard holding `k_pos` (hi <= lo: nothing)."""
    lo, hi = mask.interval(q_pos)
    runs = find_runs(k_pos)
    return rows_before(runs, lo), rows_before(runs, hi)


def rows_before(runs: Runs, positions: IntArray) -> IntArray:
    """How many rows of a shard come before each of the ascending `positions`.

    The count stands still before, between and after the runs, and climbs by one a position inside them.
    """
    pieces = np.searchsorted(positions, np.stack(runs[:2], axis=1).ravel())
    counts = np.diff(np.concatenate(([0], pieces, [len(positions)])))
    offset, climbs = np.zeros(len(counts), dtype=np.int64), np.zeros(len(counts), dtype=np.int64)
    offset[1::2], climbs[1::2] = runs.row - runs.start, 1
    offset[2::2] = runs.row + runs.stop - runs.start
    rows = np.repeat(climbs, counts)
    rows *= positions
    rows += np.repeat(offset, counts)
    return rows


def needed_rows(lo: IntArray, hi: IntArray) -> IntArray:
    """Rows inside at least one of the ascending intervals, as sorted disjoint intervals [M, 2]."""
    alive = hi > lo
    lo, hi = lo[alive], hi[alive]
    apart = lo[1:] > hi[:-1]
    return np.stack((lo[np.append(True, apart)[: len(lo)]], hi[np.append(apart, True)[: len(hi)]]), axis=1)


def compact(lo: IntArray, hi: IntArray, rows: IntArray) -> tuple[IntArray, IntArray]:
    """The same intervals counted in a buffer that holds only `rows` (as `needed_rows` gives them)."""
    lengths = rows[:, 1] - rows[:, 0]
    new_lo = rows_before(Runs(rows[:, 0], rows[:, 1], np.cumsum(lengths) - lengths), lo)
    return new_lo, new_lo + np.maximum(hi - lo, 0)


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
