"""Named ranges in a torch profile: exchanges, waits, tiles and merges are there, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ..ranks import Ranks


def ranges_of_one_call(ring: int, ulysses: int) -> dict[str, int]:
    """How often each range is in the profile of one attention call, forward and backward."""
    import hf_usp

    mesh = hf_usp.UspMesh.build(ring_degree=ring, ulysses_degree=ulysses)
    ids = torch.zeros(1, 16, dtype=torch.long)
    layout = hf_usp.shard({"input_ids": ids}, mesh)["usp"]
    q, k, v = (torch.randn(1, layout.local_length, 4, 8, requires_grad=True) for _ in range(3))
    hf_usp.usp_attention(q, k, v, layout).sum().backward()  # without a profiler nothing is recorded, nothing fails
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        hf_usp.usp_attention(q, k, v, layout).sum().backward()
    counted: Any = {entry.key: entry.count for entry in profile.key_averages()}
    return {name: count for name, count in counted.items() if name.startswith("usp.")}


@pytest.mark.parametrize(("ring", "ulysses"), [(2, 2), (1, 4)])
def test_a_profile_names_exchanges_tiles_and_merges(four_ranks: Ranks, ring: int, ulysses: int) -> None:
    for seen in four_ranks.run(ranges_of_one_call, ring, ulysses):
        names = {"usp.exchange", "usp.tiles"} | ({"usp.wait", "usp.merge"} if ring > 1 else set())
        assert seen.keys() == names
        assert seen["usp.exchange"] >= 4, "two all-to-alls forward, two backward"
        assert seen["usp.tiles"] >= 2 * ring or ring == 1 and seen["usp.tiles"] == 2
