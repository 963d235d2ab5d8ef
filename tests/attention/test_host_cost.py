"""The host's cost of a layer, counted on a fake process group without kernels: Python calls and operators, no seconds.

The bounds are 5 % above what was counted when they were written (`results/host_cost-*.md`).
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

MESHES = ((1, 1), (1, 2), (1, 8), (2, 1), (4, 1), (8, 1), (8, 8))


@pytest.fixture(scope="module")
def counts() -> dict[tuple[int, int], Any]:
    from host_cost import counts_of

    return {mesh: counts_of(*mesh) for mesh in MESHES}


@pytest.mark.parametrize(
    "mesh, calls, operators",
    [((1, 1), 40, 22), ((1, 2), 131, 108), ((2, 1), 212, 82), ((8, 8), 1053, 433)],
    ids=str,
)
def test_a_layer(counts: dict[Any, Any], mesh: tuple[int, int], calls: int, operators: int) -> None:
    found = counts[mesh]
    assert found.own_calls <= calls and found.operators <= operators, found


def test_the_plan_counts_the_same_operators(counts: dict[Any, Any]) -> None:
    """To a tenth; a ring's first step, which has more than the others, stands for all."""
    from hf_usp.planner.roofline import host_operators
    from hf_usp.planner.workload import Degrees, TrainingStep

    job = TrainingStep(4096)
    outside = host_operators(Degrees(1, 1), job) - counts[1, 1].operators
    assert 200 <= outside <= 220, "of a Llama's layer without attention: 70 forward, 140 backward"
    for (ring, ulysses), found in counts.items():
        planned = host_operators(Degrees(ulysses, ring), job) - outside
        assert found.operators * 0.93 <= planned <= found.operators * 1.1, (ring, ulysses, planned, found.operators)


def test_a_step_of_the_ring_costs_the_same_whatever_its_length(counts: dict[Any, Any]) -> None:
    few, some, many = (counts[ring, 1] for ring in (2, 4, 8))
    for name, most in (("own_calls", 114), ("operators", 43)):
        step, later = ((getattr(b, name) - getattr(a, name)) / n for a, b, n in ((few, some, 2), (some, many, 4)))
        assert later <= step <= most, (name, step, later)
    assert (few.messages, some.messages, many.messages) == (3, 9, 21)


def test_equal_shares_of_heads_are_copied_at_once(counts: dict[Any, Any]) -> None:
    """A rank between others has one copy more: before it and behind it."""
    assert counts[1, 8].operators <= counts[1, 2].operators + 8


def test_what_layers_share_is_made_once() -> None:
    """Shapes are checked, heads split and a kernel chosen for the first of the layers that are alike."""
    import torch
    from host_cost import NoKernel, fake_ranks

    import hf_usp
    from hf_usp.attention import call as core

    with fake_ranks(4), patch.object(core, "choose_kernel", side_effect=lambda *_: NoKernel()) as choose:
        mesh = hf_usp.UspMesh.build(ring_degree=2, ulysses_degree=2)
        full = torch.randn(1, 32, 4, 8)
        layout = hf_usp.shard({"inputs_embeds": full.flatten(2)}, mesh)["usp"]
        q = full[:, :8]
        for expected, changes in ((1, {}), (1, {}), (2, {"sliding_window": 4}), (2, {"sliding_window": 4})):
            hf_usp.usp_attention(q, q, q, layout, **changes)
            assert choose.call_count == expected
        hf_usp.usp_attention(q.bfloat16(), q.bfloat16(), q.bfloat16(), layout)
        assert choose.call_count == 3, "another dtype may need another kernel"
        for wrong in (q.long(), q[:, :7], q[:, :, :3]):
            with pytest.raises(hf_usp.UspError):
                hf_usp.usp_attention(q, wrong, q, layout)
        with pytest.raises(hf_usp.UspError):
            hf_usp.usp_attention(q, q, q, layout, scaling=True)
