"""A call cut into pieces of consecutive segments, for kernels that compute only some segments themselves.

Shape suffixes: T packed query rows, K packed key rows, H query heads, G kv heads, D key width, E value width.

Segments share no rows, so results of pieces lie side by side. Conventions of the log-sum-exp are the same in all
kernels, so it does not matter which kernel computes which piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from .base import Segments

Gradients = tuple[Tensor, Tensor, Tensor]


class Piece(NamedTuple):
    """Consecutive segments of a call.

    Attributes:
        own: whether the kernel computes them itself.
        rows: their query rows.
        keys: their key rows.
        segments: themselves, their offsets from 0.
    """

    own: bool
    rows: slice
    keys: slice
    segments: Segments


def cut(segments: Segments, takes: Callable[[int, int], bool]) -> Iterator[Piece]:
    """Pieces of one segment each where `takes(queries, keys)`, and of as many as possible elsewhere."""
    q, k = segments.q_offsets, segments.k_offsets
    own = [takes(q[i + 1] - q[i], k[i + 1] - k[i]) for i in range(len(q) - 1)]
    for mine, group in groupby(range(len(own)), key=own.__getitem__):
        numbers = list(group)
        for first, last in [(i, i) for i in numbers] if mine else [(numbers[0], numbers[-1])]:
            yield Piece(
                mine,
                slice(q[first], q[last + 1]),
                slice(k[first], k[last + 1]),
                part(segments, first, last + 1),
            )


def part(segments: Segments, start: int, stop: int) -> Segments:
    """Segments start .. stop - 1, their offsets from 0; no value travels between host and device."""
    q, k = segments.q_offsets[start : stop + 1], segments.k_offsets[start : stop + 1]
    if stop - start == len(segments.q_offsets) - 1:
        return segments
    return Segments(
        tuple(x - q[0] for x in q),
        tuple(x - k[0] for x in k),
        segments.window_size_left,
        segments.window_size_right,
        segments.cu_seqlens_q[start : stop + 1] - q[0],
        segments.cu_seqlens_k[start : stop + 1] - k[0],
    )


def join_outputs(
    pieces: list[Piece], compute: Callable[[Piece], tuple[Tensor, Tensor]], rows: int
) -> tuple[Tensor, Tensor]:
    """The outputs of all pieces, [rows, H, E], and their log-sum-exp, [H, rows]."""
    if len(pieces) == 1:
        return compute(pieces[0])
    out_THE, lse_HT = None, None
    for piece in pieces:
        out, lse = compute(piece)
        if out_THE is None or lse_HT is None:
            out_THE, lse_HT = out.new_empty(rows, *out.shape[1:]), lse.new_empty(lse.shape[0], rows)
        out_THE[piece.rows], lse_HT[:, piece.rows] = out, lse
    assert out_THE is not None and lse_HT is not None
    return out_THE, lse_HT


def join_gradients(pieces: list[Piece], compute: Callable[[Piece], Gradients], like: Gradients) -> Gradients:
    """The gradients of all pieces; `like` are queries, keys and values."""
    if len(pieces) == 1:
        return compute(pieces[0])
    dq, dk, dv = (x.new_empty(x.shape) for x in like)
    for piece in pieces:
        dq[piece.rows], dk[piece.keys], dv[piece.keys] = compute(piece)
    return dq, dk, dv
