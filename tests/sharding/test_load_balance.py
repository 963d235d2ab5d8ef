"""Tokens assigned for the masks of a batch: as many for every rank, and as much work."""

from __future__ import annotations

import re
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_usp.errors import UspConfigError
from hf_usp.sharding import load_balance
from hf_usp.sharding.balance_search import UNEVEN
from hf_usp.sharding.intervals import IntArray
from hf_usp.sharding.load_balance import ALL_ORDERS, ORDERS, assign_tokens, fixed_assignment
from hf_usp.sharding.masks import Documents, Mask
from hf_usp.sharding.schedule import make_ring_schedule


def packed(num_tokens: int, mean: int, sigma: float, seed: int) -> Documents:
    """Documents of log-normal lengths, as real corpora have them, in one row."""
    lengths = np.random.default_rng(seed).lognormal(np.log(mean), sigma, num_tokens).astype(int) + 1
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    return Documents.from_bounds(np.append(bounds[bounds < num_tokens], num_tokens))


def unevenness(shards: list[IntArray], mask: Mask) -> float:
    areas = [mask.area(shard) for shard in shards]
    return max(areas) * len(areas) / sum(areas)


@given(st.integers(1, 5), st.integers(1, 60), st.sampled_from(("auto", *ALL_ORDERS)), st.integers(0, 9))
def test_every_token_goes_to_one_rank_and_every_rank_has_as_many(ring: int, each: int, order: str, seed: int) -> None:
    mask = Mask(packed(ring * each, 7, 1.0, seed))
    found = assign_tokens(1, ring * each, ring, order, [mask])
    assert sorted(np.concatenate(found.shards).tolist()) == list(range(ring * each))
    for shard in found.shards:
        assert len(shard) == each or order == "zigzag"
        assert (np.diff(shard) > 0).all()


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from((4, 8)), st.sampled_from((500, 2000, 8000)), st.sampled_from((0.5, 1.0, 1.5)), st.integers(0, 99)
)
def test_packed_documents_are_even(ring: int, mean: int, sigma: float, seed: int) -> None:
    mask = Mask(packed(65536, mean, sigma, seed))
    assert unevenness(assign_tokens(1, 65536, ring, "balanced", [mask]).shards, mask) <= 1 + UNEVEN


@pytest.mark.parametrize("seed", range(4))
def test_auto_evens_out_what_fixed_orders_leave(seed: int) -> None:
    """Fixed patterns leave one of eight ranks with 1.3 to 3 times the mean."""
    mask = Mask(packed(131072, 4000, 1.0, seed))
    fixed = min(unevenness(fixed_assignment(131072, 8, order), mask) for order in ("contiguous", "zigzag"))
    found = assign_tokens(1, 131072, 8, "auto", [mask])
    assert fixed > 1.2 and found.order == "balanced"
    assert unevenness(found.shards, mask) <= 1 + UNEVEN


@pytest.mark.parametrize("seed", range(3))
def test_chunks_of_a_document_stand_together(seed: int) -> None:
    """Documents up to twice as long as a shard: by work alone, a rank would fetch 1.8 to 3.5 rows for each it holds.

    (The next seed has one document over five of eight shards, whose keys nearly everyone needs.)
    """
    mask = Mask(packed(131072, 4000, 1.0, seed))
    shards = assign_tokens(1, 131072, 8, "balanced", [mask]).shards
    fetched = [make_ring_schedule(shards, mask, rank).rows_received for rank in range(8)]
    assert max(fetched) <= 1.5 * 131072 / 8


def test_auto_stays_with_a_fixed_order_where_that_is_even() -> None:
    whole, aligned = Documents.from_bounds([0, 4096]), Documents.from_bounds([0, 1024, 2048, 3072, 4096])
    assert assign_tokens(1, 4096, 4, "auto", [Mask(whole)]).order == "zigzag"
    assert assign_tokens(1, 4096, 4, "auto", [Mask(whole, left=511)]).order == "contiguous"
    assert assign_tokens(1, 4096, 4, "auto", [Mask(aligned)]).order == "contiguous"
    assert assign_tokens(1, 4096, 4, "auto", [Mask(whole, right=-1)]).order == "zigzag"


def test_documents_too_short_to_matter_stay_where_they_are() -> None:
    """Many short documents and one a little longer: evening out would fetch keys for longer than it computes."""
    mask = Mask(Documents.from_bounds(np.append(np.arange(0, 8000, 100), [8000, 8192])))
    found = assign_tokens(1, 8192, 8, "auto", [mask])
    assert found.order in ORDERS and unevenness(found.shards, mask) > 1 + UNEVEN


def test_rows_of_a_batch_are_dealt_alike_for_their_work_together() -> None:
    """One row has its long document at the front, the other at the back."""
    documents = Documents.from_bounds([0, 3000, 3500, 4096, 4596, 5196, 8192])
    mask = Mask(documents)
    shards = assign_tokens(2, 4096, 4, "balanced", [mask]).shards
    both = [np.concatenate((shard, shard + 4096)) for shard in shards]
    assert unevenness(both, mask) <= 1 + UNEVEN


def test_layers_count_as_often_as_they_are() -> None:
    documents = packed(65536, 8000, 1.0, 0)
    full, window = Mask(documents), Mask(documents, left=255)
    for masks in ([full], [full, window, window, window]):
        shards = assign_tokens(1, 65536, 8, "balanced", masks).shards
        areas = np.array([sum(mask.area(shard) for mask in masks) for shard in shards])
        assert areas.max() <= (1 + UNEVEN) * areas.mean()


@pytest.mark.parametrize("padding", [0, 1024])
def test_a_window_over_one_document_moves_its_halo_alone(padding: int) -> None:
    """Contiguous also where the first rank, which sees no earlier tokens, leaves it uneven."""
    bounds = np.array([0, 4096 - padding, 4096]) if padding else np.array([0, 4096])
    documents = Documents(bounds, bounds[:-1], np.array([4096 - padding, 4096 - padding]) if padding else bounds[1:])
    mask = Mask(documents, left=511)
    found = assign_tokens(1, 4096, 2, "auto", [mask])
    assert found.order in ORDERS
    if not padding:
        assert found.order == "contiguous" and unevenness(found.shards, mask) > 1 + UNEVEN


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(UspConfigError, match="spiral"):
        assign_tokens(1, 8, 1, "spiral", [])


def test_the_order_of_contributing_md_is_dealt_by_name_and_changes_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    block = re.search(r"```python\n(.*?)```", page, re.S)
    assert block is not None
    found: dict[str, Any] = {}
    exec(textwrap.dedent("   " + block[1].lstrip()), found)
    masks = [Mask(packed(4096, 700, 1.0, 3)), Mask(Documents.from_bounds([0, 4096])), Mask(packed(4096, 99, 1.0, 1))]
    before = [assign_tokens(1, 4096, 4, "auto", [mask]) for mask in masks]
    monkeypatch.setattr(load_balance, "ORDERS", (*ORDERS, "striped"))
    monkeypatch.setattr(load_balance, "ALL_ORDERS", (*ALL_ORDERS, "striped"))
    monkeypatch.setattr(
        load_balance,
        "fixed_assignment",
        lambda n, ring, order: (found[order] if order == "striped" else partial(fixed_assignment, order=order))(
            n, ring
        ),
    )
    assert [shard[:2].tolist() for shard in assign_tokens(1, 4096, 4, "striped", masks).shards] == [
        [r, r + 4] for r in range(4)
    ]
    for mask, old in zip(masks, before, strict=True):
        new = assign_tokens(1, 4096, 4, "auto", [mask])
        assert new.order == old.order
        assert all(np.array_equal(a, b) for a, b in zip(new.shards, old.shards, strict=True))
