"""Which tokens a layer with a state along the sequence brings together, in integers: no torch.

Positions are flattened over the batch, as in `layout`: row b of rows of S tokens holds b*S .. b*S + S - 1. `held`
[P, N] are the positions of each rank's tokens; what all ranks hold, one after the other, is a permutation of all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .layout import Documents, IntArray


@dataclass(frozen=True, eq=False)
class ScanPlan:
    """Documents as rows that a scan runs over from left to right, and the way back.

    rows: index arrays [n, m] into the tokens of all ranks, one after the other; a row is one document, whose last token
    is repeated up to m. Rows of similar length stand together, so that at most half of what is computed is repetition.
    back [P * N]: for every rank's tokens their place in the flattened rows, one array after the other.
    """

    rows: list[IntArray]
    back: IntArray


def plan_scan(documents: Documents, held: IntArray, length: int, padded: int) -> ScanPlan:
    """The plan of a batch whose rows of `length` tokens were padded to `padded`; our padding belongs to no row.

    Padding of ours gets the result of its row's last token.
    """
    flat = held.reshape(-1)
    place = np.empty(flat.size, dtype=np.int64)  # of a position among the tokens of all ranks
    place[flat] = np.arange(flat.size)
    starts, stops = documents.bounds[:-1], documents.bounds[1:]
    real = (stops > starts) & (starts % padded < length)
    starts, stops = starts[real], stops[real]
    sizes = stops - starts
    rows, result, offset = [], np.zeros(flat.size, dtype=np.int64), 0
    magnitude = np.ceil(np.log2(sizes)).astype(np.int64)
    for group in np.unique(magnitude):
        first, size = starts[magnitude == group, None], sizes[magnitude == group, None]
        column = np.arange(size.max())[None]
        positions = first + np.minimum(column, size - 1)
        rows.append(place[positions])
        inside = column < size
        result[positions[inside]] = offset + np.flatnonzero(inside)
        offset += positions.size
    last = flat - flat % padded + np.minimum(flat % padded, length - 1)
    return ScanPlan(rows, result[last])


@dataclass(frozen=True, eq=False)
class HaloPlan:
    """What a causal convolution over `reach` earlier tokens needs on one rank.

    send[q]: which of this rank's tokens rank q reads. receive[p]: how many arrive from rank p. extended: index into
    [own tokens, arrivals by rank, one row of zeros]: every run of consecutive tokens, each behind the `reach` tokens
    that come before it in its document (zeros where the document begins). results [N]: where in `extended` the tokens
    of this rank stand.
    """

    send: list[IntArray]
    receive: list[int]
    extended: IntArray
    results: IntArray


def plan_halo(documents: Documents, held: IntArray, rank: int, reach: int) -> HaloPlan:
    """The plan of one rank; every rank computes its own from the same integers."""
    owner = np.empty(held.size, dtype=np.int64)
    local = np.empty(held.size, dtype=np.int64)
    for p, positions in enumerate(held):
        owner[positions] = p
        local[positions] = np.arange(len(positions))
    foreign = []
    for p, positions in enumerate(held):
        wanted = _before_runs(documents, positions, reach)[1]
        wanted = np.unique(wanted[wanted >= 0])
        foreign.append(wanted[owner[wanted] != p])
    send = [local[wanted[owner[wanted] == rank]] for wanted in foreign]
    mine = foreign[rank]
    order = np.argsort(owner[mine], kind="stable")  # arrivals by rank, ascending within each
    arrivals = mine[order]
    receive = np.bincount(owner[mine], minlength=len(held)).tolist()

    own = held[rank]
    where = np.full(held.size + 1, len(own) + len(arrivals), dtype=np.int64)  # the last entry: position -1, zeros
    where[own] = np.arange(len(own))
    where[arrivals] = len(own) + np.arange(len(arrivals))
    run_starts, before = _before_runs(documents, own, reach)
    run = np.searchsorted(run_starts, np.arange(len(own)), side="right") - 1
    results = np.arange(len(own)) + (run + 1) * reach
    extended = np.empty(len(own) + before.size, dtype=np.int64)
    extended[results] = np.arange(len(own))
    extended[np.setdiff1d(np.arange(extended.size), results, assume_unique=True)] = where[before.reshape(-1)]
    return HaloPlan(send, receive, extended, results)


def _before_runs(documents: Documents, positions: IntArray, reach: int) -> tuple[IntArray, IntArray]:
    """Where runs of consecutive tokens of one document begin [R], and the positions before them [R, reach], or -1."""
    document = np.searchsorted(documents.bounds, positions, side="right") - 1
    begins = np.concatenate(([True], (np.diff(positions) != 1) | (np.diff(document) != 0)))
    starts = np.flatnonzero(begins)
    before = positions[starts, None] - np.arange(reach, 0, -1)[None]
    return starts, np.where(before >= documents.bounds[document[starts], None], before, -1)
