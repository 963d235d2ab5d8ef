"""The costs of a layer whose queries select their keys: pairs and bytes. Integers only: no torch."""

from __future__ import annotations

import numpy as np

from .intervals import IntArray
from .masks import Documents, Mask


def longest_document(documents: Documents) -> int:
    """Visible tokens of the longest document.

    >>> longest_document(Documents.from_bounds([0, 3, 8]))
    5
    """
    return int((documents.last - documents.first).max())


def selected_area(mask: Mask, positions: IntArray, selected: int) -> int:
    """Number of (query, key) pairs that the queries at `positions` attend to, each to at most `selected` keys.

    >>> selected_area(Mask(Documents.from_bounds([0, 3, 8])), np.arange(8), 2)  # 1 + 2 + 2, 1 + 2 + 2 + 2 + 2
    14
    """
    first, last = mask.interval(positions)
    return int(np.clip(last - first, 0, selected).sum())


def selection_bytes(tokens: int, ranks: int, row: int, index_row: int) -> tuple[int, int]:
    """Bytes that a rank sends for one layer, forward and backward.

    Args:
        tokens: of this rank, padding included.
        ranks: ranks of the mesh.
        row: bytes of a token's keys and values (of its latent): gathered forward, reduce-scattered backward.
        index_row: bytes of a token's index keys, which have no gradient; 0 in a layer that shares indices.

    >>> selection_bytes(16_384, 8, 576 * 2, 128 * 2)[0] >> 20  # DeepSeek-V3.2, 128K tokens on 8 ranks, one layer
    154
    """
    others = tokens * (ranks - 1)
    return others * (row + index_row), others * row
