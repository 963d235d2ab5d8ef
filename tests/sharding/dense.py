"""The oracle and the random layouts of the integer tests.

`dense` writes the mask out pair by pair from its definition in words; it shares nothing with the clipping of intervals
in `hf_usp.sharding.masks`. `scenes` draws a mask and an assignment of its tokens to ring ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from hf_usp.sharding.load_balance import ORDERS, fixed_assignment, over_batch
from hf_usp.sharding.masks import UNLIMITED, Documents, Mask
from hf_usp.sharding.tiles import Tiles

Document = tuple[int, int, int]  # tokens, visible keys from, visible keys to (counted inside the document)


@dataclass(frozen=True)
class Scene:
    """A drawn case. `docs` are the documents one by one, `shards` the positions per ring rank."""

    docs: tuple[Document, ...]
    chunk: int | None
    left: int
    right: int
    shards: list[np.ndarray]

    @property
    def mask(self) -> Mask:
        """The same case in the library's words."""
        lengths = [tokens for tokens, _, _ in self.docs]
        bounds = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
        first = bounds[:-1] + [a for _, a, _ in self.docs]
        last = bounds[:-1] + [b for _, _, b in self.docs]
        documents = Documents(bounds, first, last)
        return Mask(documents if self.chunk is None else documents.chunked(self.chunk), self.left, self.right)

    def dense(self) -> np.ndarray:
        """[S, S] bool: query i sees key j. Written pair by pair."""
        home: list[tuple[int, int, bool]] = []  # (document, chunk, is a visible key) of every token
        for index, (tokens, first, last) in enumerate(self.docs):
            for t in range(tokens):
                chunk = 0 if self.chunk is None else max(0, t - first) // self.chunk
                home.append((index, chunk, first <= t < last))
        sees = np.zeros((len(home), len(home)), dtype=bool)
        for i, query in enumerate(home):
            for j, key in enumerate(home):
                near = (self.left == UNLIMITED or i - j <= self.left) and (
                    self.right == UNLIMITED or j - i <= self.right
                )
                sees[i, j] = near and key[2] and key[:2] == query[:2]
        return sees


@st.composite
def documents(draw: st.DrawFn, max_tokens: int = 48) -> tuple[Document, ...]:
    """Documents of 0 to 20 tokens: whole, padded at the front, padded at the end, both, or padding only."""
    docs: list[Document] = []
    for tokens in draw(st.lists(st.integers(0, 20), min_size=1, max_size=8)):
        first = draw(st.one_of(st.just(0), st.integers(0, tokens)))
        last = draw(st.one_of(st.just(tokens), st.integers(first, tokens)))
        if sum(d[0] for d in docs) + tokens <= max_tokens:
            docs.append((tokens, first, last))
    return tuple(docs) or ((1, 0, 1),)


sides = st.one_of(st.just(UNLIMITED), st.just(0), st.integers(0, 60))


@st.composite
def scenes(draw: st.DrawFn, max_ring: int = 5) -> Scene:
    """Documents, chunk, window and an assignment: a deal of one row, of a batch of rows, or any assignment at all."""
    docs = draw(documents())
    tokens = sum(d[0] for d in docs)
    ring = draw(st.integers(1, max_ring))
    kind = draw(st.sampled_from(ORDERS + ("batch", "any")))
    if kind == "any":
        owner = np.array(draw(st.lists(st.integers(0, ring - 1), min_size=tokens, max_size=tokens)), dtype=np.int64)
        shards = [np.flatnonzero(owner == r) for r in range(ring)]
    elif kind == "batch":
        batch = draw(st.sampled_from([b for b in (1, 2, 3, 4) if tokens % b == 0]))
        shards = over_batch(
            fixed_assignment(tokens // batch, ring, draw(st.sampled_from(ORDERS))), batch, tokens // batch
        )
    else:
        shards = fixed_assignment(tokens, ring, kind)
    chunk = draw(st.one_of(st.none(), st.integers(1, 12)))
    return Scene(docs, chunk, draw(sides), draw(sides), shards)


def count_pairs(tiles: Tiles, num_queries: int, num_keys: int) -> np.ndarray:
    """[queries, keys]: how often the tiles compute each pair, by the rule of a flash-attention window."""
    count = np.zeros((num_queries, num_keys), dtype=np.int64)
    for q0, q1, k0, k1, left, right in zip(*(f.tolist() for f in tiles), strict=True):
        assert 0 <= q0 < q1 <= num_queries and 0 <= k0 < k1 <= num_keys, "no tile is empty or outside"
        assert left >= UNLIMITED and right >= UNLIMITED
        lq, lk = q1 - q0, k1 - k0
        for row in range(lq):
            seen = 0
            for col in range(lk):
                ahead = col - (row + lk - lq)  # keys past the diagonal that ends in the bottom right corner
                if (left == UNLIMITED or -ahead <= left) and (right == UNLIMITED or ahead <= right):
                    count[q0 + row, k0 + col] += 1
                    seen += 1
            assert seen, "every row of a tile sees at least one key"
    return count
