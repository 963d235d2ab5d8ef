"""Orders, masks and tiles against the dense mask written out pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_usp.errors import UspConfigError, UspError, UspMaskError
from hf_usp.sharding.intervals import compact_intervals, merge_intervals
from hf_usp.sharding.load_balance import (
    ORDERS,
    PATTERNS,
    WORTH,
    balance,
    choose_order,
    fixed_assignment,
    over_batch,
    own_and_rest,
)
from hf_usp.sharding.masks import Documents, Mask, visible
from hf_usp.sharding.tiles import cut_tiles

from .dense import Scene, count_pairs, scenes


@given(scenes())
def test_interval_is_the_dense_mask(scene: Scene) -> None:
    dense = scene.dense()
    positions = np.arange(len(dense))
    lo, hi = scene.mask.interval(positions)
    assert np.array_equal((positions >= lo[:, None]) & (positions < hi[:, None]), dense)
    assert scene.mask.area(positions) == dense.sum()
    assert [scene.mask.area(shard) for shard in scene.shards] == [dense[shard].sum() for shard in scene.shards]
    assert scene.mask.area_before(np.arange(len(dense) + 1)).tolist() == [0, *dense.sum(1).cumsum()]


@given(scenes())
def test_tiles_cover_every_pair_of_every_shard_pair_once(scene: Scene) -> None:
    dense, mask = scene.dense(), scene.mask
    for q_pos in scene.shards:
        for k_pos in scene.shards:
            tiles = cut_tiles(*visible(q_pos, k_pos, mask))
            expected = dense[np.ix_(q_pos, k_pos)]
            assert np.array_equal(count_pairs(tiles, len(q_pos), len(k_pos)), expected)
            assert tiles.area() == expected.sum()


@given(scenes())
def test_needed_rows_are_the_rows_that_somebody_sees(scene: Scene) -> None:
    dense, mask = scene.dense(), scene.mask
    for q_pos in scene.shards:
        for k_pos in scene.shards:
            lo, hi = visible(q_pos, k_pos, mask)
            rows = merge_intervals(lo, hi)
            kept = [row for a, b in rows.tolist() for row in range(a, b)]
            assert kept == np.flatnonzero(dense[np.ix_(q_pos, k_pos)].any(axis=0)).tolist()
            assert (rows[:, 0] < rows[:, 1]).all() and (rows[1:, 0] > rows[:-1, 1]).all(), "disjoint, merged, ascending"


@given(scenes())
def test_compact_names_the_same_keys_in_the_packed_buffer(scene: Scene) -> None:
    mask = scene.mask
    for q_pos in scene.shards:
        for k_pos in scene.shards:
            lo, hi = visible(q_pos, k_pos, mask)
            rows = merge_intervals(lo, hi)
            packed = np.concatenate([k_pos[:0], *(k_pos[a:b] for a, b in rows)])
            new_lo, new_hi = compact_intervals(lo, hi, rows)
            for a, b, c, d in zip(lo, hi, new_lo, new_hi, strict=True):
                assert np.array_equal(k_pos[a:b], packed[c:d])


@given(st.integers(0, 200), st.integers(1, 9), st.sampled_from(ORDERS))
def test_every_order_deals_each_token_once_in_ascending_order(tokens: int, ring: int, order: str) -> None:
    shards = fixed_assignment(tokens, ring, order)
    assert len(shards) == ring
    assert sorted(np.concatenate(shards).tolist()) == list(range(tokens))
    sizes = [len(s) for s in shards]
    assert max(sizes) - min(sizes) <= (1 if order == "contiguous" else 2)
    assert all((np.diff(s) > 0).all() for s in shards)


@given(st.integers(1, 4), st.integers(0, 40), st.integers(1, 5), st.sampled_from(ORDERS))
def test_a_batch_deals_every_row_alike(batch: int, tokens: int, ring: int, order: str) -> None:
    shards = fixed_assignment(tokens, ring, order)
    for one, all_rows in zip(shards, over_batch(shards, batch, tokens), strict=True):
        assert all_rows.tolist() == [b * tokens + p for b in range(batch) for p in one.tolist()]


def test_zigzag_pairs_an_early_and_a_late_chunk() -> None:
    assert [s.tolist() for s in fixed_assignment(8, 2, "zigzag")] == [[0, 1, 6, 7], [2, 3, 4, 5]]


def test_chunks_count_from_the_first_visible_key() -> None:
    padded = Documents(np.array([0, 7]), np.array([2]), np.array([7])).chunked(3)
    assert padded.bounds.tolist() == [0, 5, 7]
    assert padded.first.tolist() == [2, 5]


@pytest.mark.parametrize("aligned", [True, False])
def test_a_causal_mask_needs_one_tile_per_zigzag_step(aligned: bool) -> None:
    tokens = 64 if aligned else 61
    mask = Mask(Documents.from_bounds([0, tokens]))
    shards = fixed_assignment(tokens, 4, "zigzag")
    for r, mine in enumerate(shards):
        for s, theirs in enumerate(shards):
            tiles = cut_tiles(*visible(mine, theirs, mask))
            # Own keys: two squares of the two chunks, joined in one causal band. Others: one rectangle.
            assert len(tiles.q0) == 1, (r, s)


def whole(tokens: int) -> Documents:
    return Documents.from_bounds([0, tokens])


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(1, 40))
def test_contiguous_causal_balance_is_ring_over_twice_ring_less_one(ring: int, per_rank: int) -> None:
    n = per_rank
    shards = fixed_assignment(n * ring, ring, "contiguous")
    busiest = n * n * (ring - 1) + n * (n + 1) / 2  # the last rank: all earlier keys and its own triangle
    mean = n * ring * (n * ring + 1) / 2 / ring
    assert balance(shards, Mask(whole(n * ring))) == pytest.approx(mean / busiest, abs=1e-12)


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(1, 40))
def test_zigzag_balances_a_causal_mask_perfectly(ring: int, half: int) -> None:
    assert balance(fixed_assignment(2 * half * ring, ring, "zigzag"), Mask(whole(2 * half * ring))) == 1.0


def test_published_balance_figures_at_64k_tokens_on_four_ranks() -> None:
    tokens, ring = 65536, 4
    causal, window = Mask(whole(tokens)), Mask(whole(tokens), left=4095)
    figure = {
        (order, name): round(100 * balance(fixed_assignment(tokens, ring, order), mask))
        for order in PATTERNS
        for name, mask in (("causal", causal), ("window", window))
    }
    assert figure == {
        ("contiguous", "causal"): 57,
        ("zigzag", "causal"): 100,
        ("contiguous", "window"): 97,
        ("zigzag", "window"): 86,
    }


def test_auto_takes_the_order_that_the_masks_of_all_layers_prefer() -> None:
    tokens, ring = 1024, 4
    causal, both = Mask(whole(tokens)), Mask(whole(tokens), right=-1)
    assert choose_order(1, tokens, ring, [causal]) == "zigzag"
    assert choose_order(1, tokens, ring, [both]) == "zigzag", "a tie"
    assert choose_order(1, tokens, 1, [causal]) == "contiguous", "one rank: nothing to balance"
    # Windows and documents as long as a shard keep a contiguous rank at home; full layers among them weigh more.
    window = Mask(whole(tokens), left=31)
    aligned = Mask(Documents.from_bounds([0, 256, 512, 768, 1024]))
    assert choose_order(1, tokens, ring, [window]) == "contiguous"
    assert choose_order(1, tokens, ring, [aligned]) == "contiguous"
    assert choose_order(1, tokens, ring, [window, window, causal]) == "zigzag"


@settings(max_examples=60)
@given(scenes(), st.sampled_from((1, 2, 3, 4)))
def test_auto_has_the_least_busy_rank_then_the_shortest_path_then_the_fewest_foreign_keys(
    scene: Scene, ring: int
) -> None:
    tokens = scene.mask.documents.num_tokens
    dense = scene.dense()
    work, rank_by = {}, {}
    for order in PATTERNS:
        shards = fixed_assignment(tokens, ring, order)
        own = [dense[np.ix_(shard, shard)].sum() for shard in shards]
        rest = [dense[shard].sum() - o for shard, o in zip(shards, own, strict=True)]
        assert [x.tolist() for x in own_and_rest(shards, scene.mask)] == [own, rest]
        work[order] = max(o + r for o, r in zip(own, rest, strict=True))
        rank_by[order] = (max(own) + max(rest), sum(rest))
    if ring > 1:
        chosen = choose_order(1, tokens, ring, [scene.mask])
        if max(work.values()) - min(work.values()) > WORTH * max(work.values()):
            assert work[chosen] == min(work.values())
        else:
            assert rank_by[chosen] == min(rank_by.values())


def test_packed_documents_take_the_order_with_the_even_work() -> None:
    # Contiguous shards need nothing of each other, but one has a quarter more to do.
    mask = Mask(Documents.from_bounds([0, 585, 1365, 2048, 3413, 4096]))
    busiest = {
        order: max(mask.area(s) for s in fixed_assignment(4096, 2, order)) / (mask.area(np.arange(4096)) / 2)
        for order in ORDERS
    }
    assert busiest["contiguous"] > 1.2 and busiest["zigzag"] < 1.05
    assert choose_order(1, 4096, 2, [mask]) == "zigzag"


def test_a_window_stays_contiguous_at_any_length() -> None:
    for tokens in (65536, 65536 + 8, 60000, 4096 * 4):
        mask = Mask(whole(tokens), left=4095)
        assert choose_order(1, tokens, 4, [mask]) == "contiguous", tokens


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(UspConfigError, match="spiral"):
        fixed_assignment(8, 2, "spiral")


@pytest.mark.parametrize("ring", [0, -1])
@pytest.mark.parametrize("order", ORDERS)
def test_a_ring_of_no_ranks_is_refused(ring: int, order: str) -> None:
    with pytest.raises(UspConfigError, match="ring"):
        fixed_assignment(8, ring, order)


@pytest.mark.parametrize("size", [0, -3])
def test_a_chunk_without_tokens_is_refused(size: int) -> None:
    with pytest.raises(UspMaskError, match=str(size)):
        whole(8).chunked(size)


@pytest.mark.parametrize(("left", "right"), [(-2, 0), (3, -5)])
def test_a_negative_window_is_refused(left: int, right: int) -> None:
    with pytest.raises(UspMaskError, match="window"):
        Mask(whole(8), left, right)


@pytest.mark.parametrize(
    ("bounds", "first", "last"),
    [
        ([0, 5, 3], [0, 5], [5, 3]),  # descending
        ([1, 5], [1], [5]),  # does not begin at 0
        ([0, 5], [0], [6]),  # visible keys outside the document
        ([0, 5], [3], [2]),  # crossed
        ([0, 2, 5], [0], [2]),  # one entry too few
        ([], [], []),
    ],
)
def test_documents_that_contradict_themselves_are_refused(bounds: list[int], first: list[int], last: list[int]) -> None:
    with pytest.raises(UspError):
        Documents(*(np.array(x, dtype=np.int64) for x in (bounds, first, last)))


def test_chunks_counted_from_the_row_or_from_the_document() -> None:
    """Two rows of 12 tokens, a document of 5 in the first; chunks of 4."""
    packed = Documents.from_bounds([0, 5, 12, 24])
    assert packed.chunked(4).bounds.tolist() == [0, 4, 5, 9, 12, 16, 20, 24]
    assert packed.chunked(4, 12).bounds.tolist() == [0, 4, 5, 8, 12, 16, 20, 24]
