"""The plans of all ring ranks together: one mask, each pair once; what one sends is what the other expects."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_usp.errors import UspConfigError
from hf_usp.sharding.intervals import IntArray
from hf_usp.sharding.load_balance import ORDERS, fixed_assignment
from hf_usp.sharding.masks import Documents, Mask, visible
from hf_usp.sharding.schedule import RingSchedule, make_ring_schedule, partners
from hf_usp.sharding.tiles import Tiles, cut_tiles, group_by_window

from .dense import Scene, count_pairs, scenes


def all_plans(shards: list[IntArray], mask: Mask) -> list[RingSchedule]:
    return [make_ring_schedule(shards, mask, rank) for rank in range(len(shards))]


def whole(tokens: int, left: int = -1, right: int = 0) -> Mask:
    return Mask(Documents.from_bounds([0, tokens]), left, right)


def rows_of(intervals: IntArray) -> list[int]:
    return [row for a, b in intervals.tolist() for row in range(a, b)]


@given(scenes())
def test_all_ranks_together_compute_the_mask_once_from_the_rows_that_arrive(scene: Scene) -> None:
    """Follows every message: tiles index the packed buffer that the sender's own plan fills."""
    dense = scene.dense()
    count = np.zeros(dense.shape, dtype=np.int64)
    plans = all_plans(scene.shards, scene.mask)
    for plan, mine in zip(plans, scene.shards, strict=True):
        assert plan.num_tokens == len(mine)
        for i, step in enumerate(plan.steps):
            arrived = mine
            if i:
                (send,) = [s.send_intervals for s in plans[step.recv_rank].steps[1:] if s.send_rank == plan.rank]
                arrived = scene.shards[step.recv_rank][rows_of(send)]
                assert step.num_received == len(arrived), "the send_rank expects what the sender packs"
            pairs = count_pairs(step.tiles, len(mine), len(arrived))
            count[np.ix_(mine, arrived)] += pairs
            assert i == 0 or pairs.any(axis=0).all(), "no row travels that nobody sees"
    assert np.array_equal(count, dense)
    assert sum(plan.area for plan in plans) == dense.sum()
    assert [plan.area for plan in plans] == [dense[shard].sum() for shard in scene.shards]


@given(scenes())
def test_sender_and_reader_meet_in_the_same_step(scene: Scene) -> None:
    plans = all_plans(scene.shards, scene.mask)
    ring = len(plans)
    for rank, plan in enumerate(plans):
        assert len(plan.steps) == ring
        assert (plan.steps[0].recv_rank, plan.steps[0].send_rank, plan.steps[0].num_sent) == (rank, rank, 0)
        for i, step in enumerate(plan.steps[1:], start=1):
            assert (step.recv_rank, step.send_rank) == ((rank - i) % ring, (rank + i) % ring)
            there = plans[step.send_rank].steps[i]
            assert there.recv_rank == rank and there.num_received == step.num_sent
    assert sum(p.rows_sent for p in plans) == sum(p.rows_received for p in plans)
    assert [p.messages for p in plans] == [sum(s.num_sent > 0 for s in p.steps) for p in plans]


@given(st.integers(1, 5), st.integers(1, 5))
def test_transfers_between_nodes_come_first_and_are_spread(nodes: int, per_node: int) -> None:
    """Every pair once; in each step all ranks of a node cross, to different ranks, or none does; those steps first."""
    ring = nodes * per_node
    everyone = [partners(ring, per_node, rank) for rank in range(ring)]
    crossing = []
    for step in zip(*everyone, strict=True):
        readers = [send_rank for _, send_rank in step]
        assert sorted(readers) == list(range(ring))
        assert all(step[send_rank][0] == rank for rank, send_rank in enumerate(readers)), (
            "the send_rank expects this recv_rank"
        )
        crosses = {send_rank // per_node != rank // per_node for rank, send_rank in enumerate(readers)}
        assert len(crosses) == 1
        crossing.append(crosses.pop())
    assert crossing == [True] * (ring - per_node) + [False] * (per_node - 1)
    for rank, pairs in enumerate(everyone):
        assert (
            {recv_rank for recv_rank, _ in pairs} == {send_rank for _, send_rank in pairs} == set(range(ring)) - {rank}
        )
    if 1 in (nodes, per_node):
        assert everyone[0] == [(-i % ring, i) for i in range(1, ring)]


@pytest.mark.parametrize("window", [2, 16, 17, 40, 126, 127, 128, 500])
def test_a_window_meets_its_neighbours_first_on_any_nodes(window: int) -> None:
    """No step that carries nothing lies between those that do; a window over the whole row is none."""
    shards = fixed_assignment(128, 8, "contiguous")
    orders = []
    for per_node in (1, 4):
        plans = [make_ring_schedule(shards, whole(128, window - 1), rank, per_node) for rank in range(8)]
        orders.append([step.recv_rank for step in plans[7].steps])
        carries = [any(one.num_received for one in step) for step in zip(*(p.steps[1:] for p in plans), strict=True)]
        assert carries == sorted(carries, reverse=True)
    assert (orders[0] == orders[1]) == (window < 128)


@settings(max_examples=30)
@given(st.integers(2, 9), st.integers(1, 20))
def test_causal_zigzag_moves_three_quarters_of_the_unpruned_ring(ring: int, half: int) -> None:
    tokens = 2 * half * ring
    for plan in all_plans(fixed_assignment(tokens, ring, "zigzag"), whole(tokens)):
        unpruned = (ring - 1) * 2 * half
        # Its early chunk is needed by all others, its late chunk by the lower (or, for what arrives, the higher) ranks.
        assert plan.rows_sent == (ring - 1) * half + plan.rank * half
        assert plan.rows_received == (ring - 1) * half + (ring - 1 - plan.rank) * half
        assert plan.rows_sent + plan.rows_received == 1.5 * unpruned
    assert (
        sum(p.rows_sent for p in all_plans(fixed_assignment(tokens, ring, "zigzag"), whole(tokens)))
        == 0.75 * unpruned * ring
    )


@settings(max_examples=40)
@given(st.integers(2, 6), st.integers(1, 24), st.integers(1, 60))
def test_a_sliding_window_moves_only_the_halo(ring: int, per_rank: int, window: int) -> None:
    tokens = ring * per_rank
    plans = all_plans(fixed_assignment(tokens, ring, "contiguous"), whole(tokens, left=window - 1))
    for plan in plans:
        start = plan.rank * per_rank
        assert plan.rows_received == min(window - 1, start), "w - 1 keys before the shard, and no more"
        neighbours = -(-min(window - 1, start) // per_rank)
        assert sum(step.num_received > 0 for step in plan.steps) == neighbours
    # Zigzag has two edges a rank, except where its chunks touch (last rank) or begin the sequence (first rank).
    half = per_rank * 2
    shards = fixed_assignment(ring * half, ring, "zigzag")
    reach = min(window, per_rank)
    received = [p.rows_received for p in all_plans(shards, whole(ring * half, left=reach - 1))]
    assert received == [(reach - 1) * (1 if rank in (0, ring - 1) else 2) for rank in range(ring)]


@settings(max_examples=30)
@given(st.integers(1, 6), st.lists(st.integers(1, 12), min_size=1, max_size=4), st.sampled_from((-1, 0)))
def test_documents_aligned_with_shards_move_nothing(ring: int, lengths: list[int], right: int) -> None:
    bounds = np.concatenate(([0], np.cumsum(lengths * ring)))
    mask = Mask(Documents.from_bounds(bounds), right=right)
    for plan in all_plans(fixed_assignment(int(bounds[-1]), ring, "contiguous"), mask):
        assert (plan.rows_sent, plan.rows_received, plan.messages) == (0, 0, 0)


def test_a_document_over_one_edge_moves_only_its_own_rows() -> None:
    # Shards hold 0..7 and 8..15; the document 6..9 crosses.
    mask = Mask(Documents.from_bounds([0, 6, 10, 16]))
    low, high = all_plans(fixed_assignment(16, 2, "contiguous"), mask)
    assert low.steps[1].send_intervals.tolist() == [[6, 8]] and high.steps[1].num_received == 2
    assert high.rows_sent == 0


def test_one_rank_talks_to_nobody() -> None:
    (plan,) = all_plans(fixed_assignment(32, 1, "zigzag"), whole(32))
    assert len(plan.steps) == 1 and plan.messages == 0
    assert plan.steps[0].tiles.area() == 32 * 33 // 2


@given(scenes(max_ring=2))
def test_groups_share_a_window_and_lose_no_tile(scene: Scene) -> None:
    tiles = cut_tiles(*visible(scene.shards[0], scene.shards[-1], scene.mask))
    groups = group_by_window(tiles)
    windows = [(g.left[0], g.right[0]) for g in groups]
    assert len(set(windows)) == len(windows)
    assert all(len(set(g.left)) == len(set(g.right)) == 1 for g in groups)

    def listed(some: list[Tiles]) -> list[tuple[int, ...]]:
        return sorted(tile for g in some for tile in zip(*(f.tolist() for f in g), strict=True))

    assert listed(groups) == listed([tiles])


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_ring_is_refused(rank: int) -> None:
    with pytest.raises(UspConfigError, match="rank"):
        make_ring_schedule(fixed_assignment(8, 2, "zigzag"), whole(8), rank)


@pytest.mark.parametrize("order", ORDERS)
def test_fewer_tokens_than_ranks_leave_some_with_nothing(order: str) -> None:
    plans = all_plans(fixed_assignment(3, 5, order), whole(3))
    assert sum(p.area for p in plans) == 6
    assert sorted(p.num_tokens for p in plans) == [0, 0, 1, 1, 1]
