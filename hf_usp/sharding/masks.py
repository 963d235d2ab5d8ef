"""Which keys a query sees: documents, and a mask over them. Integers only: no torch.

The one idea: **a query sees one interval of keys.** Causal masks, packed documents, sliding windows, chunks, padding
and bidirectional attention each only clip that interval (`Mask.interval`).

Positions are global and flattened over the batch: row b of a batch of rows of S tokens holds b*S .. b*S + S - 1.
A batch is a pack of its rows. Windows follow FlashAttention: ``left`` / ``right`` count the keys before / after the
diagonal; -1 means no limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UspBatchError, UspMaskError
from .intervals import IntArray, Runs, find_runs, merge_intervals, rows_before

UNLIMITED = -1


@dataclass(frozen=True, eq=False)
class Documents:
    """Consecutive groups of tokens that see only each other.

    Attributes:
        bounds: document i holds the positions bounds[i] .. bounds[i + 1] - 1 [N + 1].
        first: first visible key of each document [N].
        last: position after the last visible key of each document [N]. Padding is not visible. A document with
            first == last has no visible key, and nothing is computed for it.

    >>> packed = Documents.from_bounds([0, 3, 8])  # two documents, of 3 and 5 tokens
    >>> packed.first.tolist(), packed.last.tolist(), packed.num_tokens
    ([0, 3], [3, 8], 8)
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
        """Documents without padding: every token is a visible key.

        >>> Documents.from_bounds([0, 3, 8]).bounds.tolist()
        [0, 3, 8]
        """
        edges = np.asarray(bounds, dtype=np.int64)
        return cls(edges, edges[:-1], edges[1:])

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.bounds[-1])

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(np.diff(self.bounds).max(initial=0))

    def chunked(self, size: int, row: int = 0) -> Documents:
        """Each document split into chunks of `size` tokens, counted from its first visible key (Llama 4).

        With a `row` length, documents inside a row count their chunks from the first token of the row.
        Raises `UspMaskError` for a size below 1.

        >>> Documents.from_bounds([0, 5]).chunked(2).bounds.tolist()
        [0, 2, 4, 5]
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
    """A query at position i sees the visible keys of its own document in [i - left, i + right].

    Attributes:
        documents: the documents of all rows.
        left: keys before the query that it sees; -1: no limit.
        right: keys after the query that it sees; -1: no limit, 0: causal.

    >>> mask = Mask(Documents.from_bounds([0, 3, 8]), left=1)  # packed, causal, sliding_window=2
    >>> lo, hi = mask.interval(np.arange(8))
    >>> lo.tolist(), hi.tolist()
    ([0, 0, 1, 3, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7, 8])
    """

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
        """Interval [lo, hi) of global positions that each query sees; hi <= lo where a query sees nothing.

        Query 4 of two documents of 3 and 5 tokens sees keys 3 and 4:

        >>> [int(x[0]) for x in Mask(Documents.from_bounds([0, 3, 8])).interval(np.array([4]))]
        [3, 5]
        """
        # Positions ascend: where they are many, documents are looked up among them and not the other way around.
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

        Computed for each run inside a document, where the intervals of neighbours overlap or touch.

        >>> Mask(Documents.from_bounds([0, 3, 8])).reach(find_runs(np.array([4, 5]))).tolist()
        [[3, 6]]
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
        return merge_intervals(lo, np.where(start < stop, hi, lo))

    def area(self, positions: IntArray) -> int:
        """Number of (query, key) pairs that the queries at `positions` see.

        >>> Mask(Documents.from_bounds([0, 3, 8])).area(np.arange(8))  # 3 * 4 / 2 + 5 * 6 / 2
        21
        """
        runs = find_runs(positions)
        return int((self.area_before(runs.stop) - self.area_before(runs.start)).sum())

    def area_before(self, positions: IntArray) -> IntArray:
        """Number of (query, key) pairs of all queries before each of the ascending `positions`.

        >>> Mask(Documents.from_bounds([0, 3, 8])).area_before(np.array([3, 8])).tolist()
        [6, 21]
        """
        docs = self.documents
        lengths = np.diff(docs.bounds)
        before = np.concatenate(([0], np.cumsum(self._pairs(lengths, docs.bounds[:-1], docs.first, docs.last))))
        document = np.minimum(np.searchsorted(docs.bounds, positions, side="right"), len(lengths)) - 1
        start = docs.bounds[document]
        return before[document] + self._pairs(positions - start, start, docs.first[document], docs.last[document])

    def _pairs(self, count: IntArray, start: IntArray, first: IntArray, last: IntArray) -> IntArray:
        """Pairs of the first `count` queries from `start` on with the keys from `first` to `last`."""
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


def visible(q_pos: IntArray, k_pos: IntArray, mask: Mask) -> tuple[IntArray, IntArray]:
    """Interval of rows of the shard `k_pos` that each query of `q_pos` sees (hi <= lo: nothing).

    >>> mask = Mask(Documents.from_bounds([0, 3, 8]))
    >>> [x.tolist() for x in visible(np.array([6, 7]), np.array([2, 3, 4, 5]), mask)]  # keys 3, 4, 5 are rows 1 to 3
    [[1, 1], [4, 4]]
    """
    lo, hi = mask.interval(q_pos)
    runs = find_runs(k_pos)
    return rows_before(runs, lo), rows_before(runs, hi)
