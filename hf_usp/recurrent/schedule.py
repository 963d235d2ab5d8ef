"""Which tokens and states a layer with a state along the sequence exchanges. Integers only: no torch.

Positions are flattened over the batch, as in `layout`: row b of rows of S tokens holds b*S .. b*S + S - 1. `held`
[P, N] are the positions of each rank's tokens; what all ranks hold, one after the other, is a permutation of all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..sharding.intervals import IntArray
from ..sharding.masks import Documents


@dataclass(frozen=True, eq=False)
class ScanSchedule:
    """Documents as rows that a scan reads from left to right, and the way back.

    Attributes:
        rows: index arrays [n, m] into the tokens of all ranks, concatenated by rank. A row is one document; its last
            token is repeated up to m. Rows of similar length are grouped, so at most half of the work is repetition.
        back: for the tokens of all ranks, their index in the flattened rows [P * N].
    """

    rows: list[IntArray]
    back: IntArray


def make_scan_schedule(documents: Documents, held: IntArray, length: int, padded: int) -> ScanSchedule:
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
    return ScanSchedule(rows, result[last])


@dataclass(frozen=True, eq=False)
class HaloSchedule:
    """The tokens that a causal convolution over `reach` earlier tokens needs on one rank.

    Attributes:
        send: send[q]: own tokens that rank q reads.
        receive: receive[p]: number of tokens that arrive from rank p.
        extended: index into [own tokens, received tokens by rank, one row of zeros]. Every run of consecutive tokens
            follows the `reach` tokens before it in its document (zeros where the document begins).
        results: index in `extended` of each own token [N].
    """

    send: list[IntArray]
    receive: list[int]
    extended: IntArray
    results: IntArray


def make_halo_schedule(documents: Documents, held: IntArray, rank: int, reach: int) -> HaloSchedule:
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
    return HaloSchedule(send, receive, extended, results)


def _before_runs(documents: Documents, positions: IntArray, reach: int) -> tuple[IntArray, IntArray]:
    """Where runs of consecutive tokens of one document begin [R], and the positions before them [R, reach], or -1."""
    document = np.searchsorted(documents.bounds, positions, side="right") - 1
    begins = np.concatenate(([True], (np.diff(positions) != 1) | (np.diff(document) != 0)))
    starts = np.flatnonzero(begins)
    before = positions[starts, None] - np.arange(reach, 0, -1)[None]
    return starts, np.where(before >= documents.bounds[document[starts], None], before, -1)


@dataclass(frozen=True, eq=False)
class StateSchedule:
    """Runs of consecutive tokens of one document on every rank, and the states that are sent between them.

    A run gives a state if it does not end its document. Giving runs of all ranks are numbered in sequence order.

    Attributes:
        rows: index arrays [n, m] into own tokens, one run a row; the last token is repeated up to m.
        sizes: tokens of each run.
        back: for own tokens, their index in the flattened rows [N].
        gives: gives[p]: number of giving runs of rank p.
        giving: own rows that give a state, in sequence order.
        takes: takes[p]: numbers of the giving runs whose final state rank p needs [P].
        taking: taking[i]: index into takes[rank] for own row i; -1: it starts from zero.
        order: permutation from rank order to sequence order of the giving runs.
        chained: chained[i]: whether giving run i itself continues from giving run i - 1.
        busiest: tokens in the giving runs of the rank that has most, and the number of these runs.
    """

    rows: list[IntArray]
    sizes: list[IntArray]
    back: IntArray
    gives: list[int]
    giving: IntArray
    takes: list[IntArray]
    taking: IntArray
    order: IntArray
    chained: IntArray
    busiest: tuple[int, int]


def make_state_schedule(documents: Documents, held: IntArray, rank: int, length: int, padded: int) -> StateSchedule:
    """The plan of one rank; every rank computes its own from the same integers. Padding of ours passes no state."""
    owner, start, size, document = _all_runs(documents, held)
    real = start % padded < length
    # In the order of positions a document's runs are neighbours.
    carry_in = np.concatenate(([False], document[1:] == document[:-1])) & real
    carry_out = np.concatenate((carry_in[1:], [False]))
    by_rank = [np.flatnonzero(carry_out & (owner == p)) for p in range(len(held))]
    giving = np.flatnonzero(carry_out)

    mine = np.flatnonzero(owner == rank)
    place = np.empty(held.size, dtype=np.int64)
    place[held[rank]] = np.arange(len(held[rank]))
    rows, sizes, kept, offset = [], [], [], 0
    back = np.empty(len(held[rank]), dtype=np.int64)
    magnitude = np.ceil(np.log2(size[mine])).astype(np.int64)
    for group in np.unique(magnitude):
        runs = mine[magnitude == group]
        column = np.arange(size[runs].max())[None]
        index = place[start[runs]][:, None] + np.minimum(column, size[runs][:, None] - 1)
        inside = column < size[runs][:, None]
        back[index[inside]] = offset + np.flatnonzero(inside)
        rows.append(index)
        sizes.append(size[runs])
        kept.append(runs)
        offset += index.size
    runs = np.concatenate(kept)
    row_of = np.full(len(owner), -1, dtype=np.int64)
    row_of[runs] = np.arange(len(runs))
    takes = [np.searchsorted(giving, np.flatnonzero(carry_in & (owner == p)) - 1) for p in range(len(held))]
    taken_by_me = np.flatnonzero(carry_in & (owner == rank))
    taking = np.full(len(runs), -1, dtype=np.int64)
    taking[row_of[taken_by_me]] = np.arange(len(taken_by_me))
    return StateSchedule(
        rows=rows,
        sizes=sizes,
        back=back,
        gives=[len(runs) for runs in by_rank],
        giving=row_of[by_rank[rank]],
        takes=takes,
        taking=taking,
        order=np.argsort(np.concatenate(by_rank), kind="stable"),
        chained=carry_in[giving],
        busiest=max((int(size[runs].sum()), len(runs)) for runs in by_rank),
    )


def _all_runs(documents: Documents, held: IntArray) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Owner, first position, size and document of every rank's runs, in the order of their positions."""
    owners, firsts, sizes = [], [], []
    for rank, positions in enumerate(held):
        starts, _ = _before_runs(documents, positions, 1)
        owners.append(np.full(len(starts), rank))
        firsts.append(positions[starts])
        sizes.append(np.diff(np.append(starts, len(positions))))
    owner, first, size = (np.concatenate(parts) for parts in (owners, firsts, sizes))
    by_position = np.argsort(first, kind="stable")
    owner, first, size = owner[by_position], first[by_position], size[by_position]
    return owner, first, size, np.searchsorted(documents.bounds, first, side="right") - 1


@dataclass(frozen=True)
class ScanSizes:
    """Sizes of the scan of one layer.

    Attributes:
        heads: number of heads.
        groups: number of groups of heads that share a key.
        key: width of a key.
        value: width of a value.
        item: bytes of a number.
    """

    heads: int
    groups: int
    key: int
    value: int
    item: int


# An H100 computes about this many operations in the time in which NVLink moves a byte; slower links only make moving
# dearer, and so states pay earlier than this says.
FLOPS_PER_BYTE = 1000
CHUNK = 64  # tokens that the kernels of the delta rule take at once


def states_pay(sizes: ScanSizes, tokens: int, ranks: int, busiest: tuple[int, int]) -> bool:
    """Whether passing states costs less than exchanging heads for tokens, both as bytes of the busiest rank.

    Args:
        sizes: of the layer.
        tokens: on each of `ranks` ranks.
        busiest: tokens and number of the runs that give a state on the rank that has most.
    """
    if ranks == 1:
        return False
    # q and k of each group, v, out and two gates of each head; then every rank scans all tokens for its heads.
    numbers = 2 * sizes.groups * sizes.key + sizes.heads * (2 * sizes.value + 2)
    mine = -(-sizes.heads // ranks)
    heads = tokens * numbers * sizes.item * (ranks - 1) / ranks
    heads += ranks * tokens * mine * _flops(sizes.key, sizes.value) / FLOPS_PER_BYTE
    # The state's affine map goes out in fp32, the state comes back; giving runs are scanned twice, first with the map.
    given_tokens, given_runs = busiest
    states = given_runs * sizes.heads * sizes.key * (sizes.key + 2 * sizes.value) * 4
    work = tokens * _flops(sizes.key, sizes.value) + given_tokens * _flops(sizes.key, sizes.key + sizes.value)
    return states + work * sizes.heads / FLOPS_PER_BYTE < heads


def _flops(key: int, value: int) -> int:
    """Operations per token and head of a chunked delta rule: inside a chunk, and reading and writing the state."""
    return 4 * CHUNK * (key + value) + 6 * key * value
