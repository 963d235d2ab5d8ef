"""Exchanges of recurrent layers: documents whole and in order, and for convolutions the tokens before each run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hf_usp.recurrent.schedule import ScanSizes, make_halo_schedule, make_scan_schedule, make_state_schedule, states_pay
from hf_usp.sharding.intervals import IntArray
from hf_usp.sharding.load_balance import ORDERS, fixed_assignment
from hf_usp.sharding.masks import Documents


@dataclass
class Assigned:
    """Packed rows whose last columns are padding of ours, assigned to ranks."""

    documents: Documents
    held: IntArray
    length: int
    padded: int


@st.composite
def assigned(draw: st.DrawFn) -> Assigned:
    ring, ulysses, batch = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    padded = 2 * ring * ulysses * draw(st.integers(1, 4))
    length = padded - draw(st.integers(0, min(3, padded - 1)))
    bounds = [0]
    for row in range(batch):
        inside = draw(st.sets(st.integers(1, max(1, length - 1)), max_size=4))
        bounds += [row * padded + cut for cut in sorted(inside) if cut < length]
        bounds += [row * padded + length] * (length < padded) + [(row + 1) * padded]
    shards = fixed_assignment(padded, ring, draw(st.sampled_from(ORDERS)))
    rows = np.stack([part for shard in shards for part in np.split(shard, ulysses)])
    held = (rows[:, None] + np.arange(batch)[None, :, None] * padded).reshape(len(rows), -1)
    return Assigned(Documents.from_bounds(bounds), held, length, padded)


@given(assigned())
def test_a_scan_sees_each_document_once_from_its_start(scene: Assigned) -> None:
    plan = make_scan_schedule(scene.documents, scene.held, scene.length, scene.padded)
    flat, bounds = scene.held.reshape(-1), scene.documents.bounds
    seen = []
    for rows in plan.rows:
        sizes = []
        for row in flat[rows]:
            start = row[0]
            stop = bounds[np.searchsorted(bounds, start, side="right")]
            assert start in bounds
            assert np.array_equal(row, np.minimum(start + np.arange(len(row)), stop - 1)), "in order, the last repeated"
            seen.extend(range(start, stop))
            sizes.append(stop - start)
        assert max(sizes) == rows.shape[1] <= 2 * min(sizes), "at most half is repetition"
    assert sorted(seen) == [p for p in range(bounds[-1]) if p % scene.padded < scene.length]
    results = flat[np.concatenate([rows.reshape(-1) for rows in plan.rows])]
    column = np.minimum(flat % scene.padded, scene.length - 1)
    assert np.array_equal(results[plan.back], flat - flat % scene.padded + column)


@given(assigned(), st.integers(1, 4))
def test_a_convolution_finds_the_tokens_before_it(scene: Assigned, reach: int) -> None:
    """Follows every message: token t's result stands behind t - reach .. t - 1, zeros before its document."""
    ranks = len(scene.held)
    plans = [make_halo_schedule(scene.documents, scene.held, rank, reach) for rank in range(ranks)]
    for rank, (plan, own) in enumerate(zip(plans, scene.held, strict=True)):
        arrivals = [scene.held[source][plans[source].send[rank]] for source in range(ranks)]
        assert [len(tokens) for tokens in arrivals] == plan.receive
        assert plan.receive[rank] == 0, "nothing is sent to oneself"
        available = np.concatenate([own, *arrivals, [-1]])
        assert len(np.unique(available)) == len(available), "nothing travels that is already there"
        extended = available[plan.extended]
        for place, position in zip(plan.results, own, strict=True):
            start = scene.documents.bounds[np.searchsorted(scene.documents.bounds, position, side="right") - 1]
            expected = [p if p >= start else -1 for p in range(position - reach, position + 1)]
            assert extended[place - reach : place + 1].tolist() == expected


@given(assigned())
def test_every_run_begins_with_what_its_document_left_behind(scene: Assigned) -> None:
    """Follows every state, here the list of the tokens that it has seen."""
    bounds = scene.documents.bounds
    ranks = range(len(scene.held))
    plans = [make_state_schedule(scene.documents, scene.held, r, scene.length, scene.padded) for r in ranks]
    runs = []  # of each rank, the tokens of its rows
    for plan, own in zip(plans, scene.held, strict=True):
        rows = [
            row[:n]
            for rows, sizes in zip(plan.rows, plan.sizes, strict=True)
            for row, n in zip(rows, sizes, strict=True)
        ]
        runs.append([own[row].tolist() for row in rows])
        assert sorted(sum(runs[-1], [])) == sorted(own.tolist()), "every token is in one run"
        repeated = np.concatenate([rows.reshape(-1) for rows in plan.rows])
        assert np.array_equal(repeated[plan.back], np.arange(len(own)))
    sent = [tokens for plan, mine in zip(plans, runs, strict=True) for tokens in (mine[row] for row in plan.giving)]
    assert [len(plan.giving) for plan in plans] == plans[0].gives
    after: list[list[int]] = []
    for index, chained in zip(plans[0].order, plans[0].chained, strict=True):
        after.append((after[-1] if chained else []) + sent[index])
    for rank in ranks:
        begins = [after[index] for index in plans[0].takes[rank]] + [[]]
        for tokens, place in zip(runs[rank], plans[rank].taking, strict=True):
            if tokens[0] % scene.padded < scene.length:
                start = bounds[np.searchsorted(bounds, tokens[0], side="right") - 1]
                assert begins[place] == list(range(start, tokens[0]))


def test_states_pay_for_long_shards_few_heads_and_documents_inside_a_rank() -> None:
    layer = ScanSizes(heads=32, groups=16, key=128, value=128, item=2)  # Qwen3-Next
    assert not states_pay(layer, tokens=512, ranks=8, busiest=(512, 2))
    assert states_pay(layer, tokens=16_384, ranks=8, busiest=(16_384, 2))
    assert states_pay(layer, tokens=512, ranks=8, busiest=(0, 0)), "nothing travels where documents end inside"
    assert states_pay(layer, tokens=512, ranks=128, busiest=(512, 2)), "more ranks than heads"
    assert not states_pay(layer, tokens=16_384, ranks=1, busiest=(0, 0))


def test_a_halo_is_no_more_than_the_reach_at_every_edge() -> None:
    held = np.stack([np.concatenate(np.split(np.arange(64), 8)[r : 8 - r : 7 - 2 * r]) for r in range(4)])
    plans = [make_halo_schedule(Documents.from_bounds([0, 64]), held, rank, 3) for rank in range(4)]
    assert [sum(plan.receive) for plan in plans] == [3, 6, 6, 3], "zigzag: the middle edge is inside one rank"
