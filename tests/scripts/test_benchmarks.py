"""The benchmarks' own arithmetic: what they predict and count, without running them whole."""

from __future__ import annotations

import mmap
import os
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch

import hf_usp
from hf_usp.batch.layout import make_layout
from hf_usp.batch.shard import shard_tensor
from hf_usp.distributed.mesh import UspMesh
from hf_usp.sharding.masks import Documents
from hf_usp.tools.explain.numbers import Case, explain

from ..harness import fresh_accelerate
from ..ranks import Ranks


@pytest.fixture(scope="module")
def two_nodes() -> ModuleType:
    import two_nodes

    return two_nodes


@pytest.mark.parametrize("ulysses", [1, 2, 4])
def test_what_crosses_between_two_nodes_is_what_explain_says(two_nodes: ModuleType, ulysses: int) -> None:
    sizes = {"heads": two_nodes.HEADS, "kv_heads": two_nodes.KV_HEADS, "head_dim": two_nodes.WIDTH}
    it = explain(Case(tokens=2048, ranks=4, ulysses=ulysses, ranks_per_node=2, **sizes))
    traffic = it.traffic
    mesh = UspMesh(4 // ulysses, ulysses, 0, 0, tuple(range(4)), None, None, None, ring_per_node=max(1, 2 // ulysses))
    layout = make_layout(Documents.from_bounds([0, 2048]), 1, 2048, mesh)
    orders = [[step.recv_rank for step in plan.steps] for plan in (layout.ring_schedule(), it.plans[0])]
    assert orders[0] == orders[1] == {1: [0, 2, 3, 1], 2: [0, 1], 4: [0]}[ulysses]
    between = (traffic.ring + traffic.ulysses)[:2, 2:]
    assert two_nodes.predicted_crossing(ulysses, 4 // ulysses, 2048) == between.sum() > 0


def test_the_hybrid_sends_least_between_nodes(two_nodes: ModuleType) -> None:
    hybrid, ring, ulysses = (two_nodes.predicted_crossing(u, 4 // u, 4096) for u in (2, 1, 4))
    assert hybrid < ring < ulysses


def test_two_nodes_says_what_it_needs(two_nodes: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(shutil, "which", lambda tool: f"/sbin/{tool}")
    assert "needs root" in two_nodes.refusal()
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    assert "iproute2 (ip, tc missing)" in two_nodes.refusal()


def waited(blocking: bool) -> tuple[int, int, int, int]:
    """(transfers, of them waited for without a tile in between) of a ring's forward, then of its backward."""
    import torch.distributed as dist
    from counting import watched_transfers

    mesh = hf_usp.UspMesh.build(ring_degree=4, ulysses_degree=1)
    layout = make_layout(Documents.from_bounds([0, 512]), 1, 512, mesh)
    torch.manual_seed(0)
    full = [torch.randn(1, 512, heads, 16) for heads in (4, 2, 2)]
    q, k, v = (shard_tensor(x, layout).contiguous().requires_grad_() for x in full)
    issue = dist.batch_isend_irecv

    def issue_and_wait(operations: list) -> list:
        works = dist_issue(operations)
        for work in works:
            work.wait()
        return []

    with watched_transfers() as forward:
        dist_issue = dist.batch_isend_irecv
        if blocking:
            dist.batch_isend_irecv = issue_and_wait  # type: ignore[assignment]
        out = hf_usp.usp_attention(q, k, v, layout)
    with watched_transfers() as backward:
        out.sum().backward()
    assert dist.batch_isend_irecv is issue
    return forward.hops, forward.exposed, backward.hops, backward.exposed


def test_ring_transfers_run_beside_tiles(four_ranks: Ranks) -> None:
    """No hop of the forward is exposed; of the backward at most the last one home."""
    for hops, exposed, back, exposed_back in four_ranks.run(waited, False):
        assert (hops, exposed) == (3, 0)
        assert back == 6 and exposed_back <= 1


def test_a_transfer_that_is_waited_for_at_once_is_seen(four_ranks: Ranks) -> None:
    for hops, exposed, _, _ in four_ranks.run(waited, True):
        assert (hops, exposed) == (3, 3)


def measured(way: str, ulysses: int, tokens: int) -> dict[str, float]:
    import length

    fresh_accelerate()
    # The benchmark's proportions of vocabulary to width; with a smaller one the peak is attention's (docs/limits.md).
    small = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 192, "head_dim": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(length, "SIZES", length.SIZES | small)
        patch.setattr(length, "CHUNK", 128)
        return length.measure(way, ulysses, tokens)


def test_the_meter_of_resident_memory_sees_what_is_touched() -> None:
    """A process that lives long may serve a small step from pages it has: the meter is tested on memory that is new."""
    import length

    before = length.resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    touched = mmap.mmap(-1, 64 << 20)  # a long run may hold as much free memory, from which a new object would be made
    for _ in range(64):
        touched.write(bytes(1 << 20))
    grown = length.resident("VmRSS") - before
    touched.close()
    assert 0.9 < grown / (64 << 20) < 1.2 and 0.9 < (length.resident("VmHWM") - before) / (64 << 20) < 1.2


def test_memory_is_flat_when_length_grows_with_ranks(four_ranks: Ranks, tmp_path: Path) -> None:
    """The benchmark of memory against length, small: 512 tokens on one rank, 2,048 on 2 x 2, the loss of one."""
    import length

    lines = [
        {"way": "usp", "processes": processes, "ulysses": ulysses, "tokens": 512 * processes, **figures}
        | {"predicted": length.predicted(processes, ulysses, 512 * processes)}
        for processes, ulysses, found in (
            (1, 1, [measured("usp", 1, 512)]),
            (4, 2, four_ranks.run(measured, "usp", 2, 2048)),
        )
        for figures in found
    ]
    lines.append({"way": "plain", "processes": 1, "ulysses": 1, "tokens": 2048} | measured("plain", 1, 2048))
    one, *mesh, plain = lines
    assert not length.too_large(lines, 1.10)
    assert all(line["loss"] == pytest.approx(plain["loss"], abs=1e-5) for line in mesh)
    assert plain["live"] > 1.5 * one["live"]
    assert length.too_large([*lines, mesh[0] | {"live": 1.2 * one["live"]}], 1.10)
    assert length.as_table(lines).count("\n") == 2 + len(lines) - 1
    length.draw(lines, tmp_path / "length.png")
    assert (tmp_path / "length.png").stat().st_size > 0


def test_the_soak_sees_growth_drift_and_ranks_that_differ() -> None:
    import soak

    def run(grown: int = 0, off: float = 0.0) -> dict[str, object]:
        seen = [dict.fromkeys((*soak.FLAT, "rss"), 7 + grown * i) for i in range(6)]
        return {"logged": {"loss": [1.0, 0.5 + off]}, "seen": seen, "again": seen}

    weights = [torch.ones(3), torch.ones(3), torch.ones(3)]
    assert not soak.failures(soak.findings(run(), [run(), run()], weights), 2)
    assert not soak.failures(soak.findings(run(1), [run(1), run()], weights), 2)
    grown = soak.failures(soak.findings(run(), [run(), run(1)], weights), 2)
    assert len(grown) == 2 * len(soak.FLAT) and "layouts grow over Trainers: 2, 0 in one process" in grown
    assert soak.failures(soak.findings(run(), [run(), run(off=1e-5)], weights), 2)[0].startswith("loss, largest")
    assert soak.failures(soak.findings(run(), [run(), run()], [*weights[:2], torch.zeros(3)]), 2)
