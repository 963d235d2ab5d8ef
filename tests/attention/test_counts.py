"""Counted, never timed: bytes on the wire, messages, launched area, copies, saved bytes and peak memory of the core.

Elsewhere: exposed hops and synchronisations in `test_overlap`, area per rank of packed documents in
`sharding/test_load_balance`, bf16 error and bitwise ulysses in `test_attention`, CPU time in
`benchmarks/attention.py`.
"""

from __future__ import annotations

import pytest
import torch

import hf_usp
from hf_usp.attention.ring import ring_backward
from hf_usp.batch.layout import MaskSpec, make_layout
from hf_usp.batch.shard import shard_tensor
from hf_usp.sharding.masks import Documents

from ..ranks import Ranks


def counted(degrees: tuple[int, int], case: str, tokens: int) -> tuple[dict[str, float], dict[str, float]]:
    """(measured, predicted) of this rank."""
    import attention as benchmark
    from counting import count

    mesh = hf_usp.UspMesh.build(ring_degree=degrees[0], ulysses_degree=degrees[1])
    window = tokens // 8 if case == "window" else None
    kind = MaskSpec(window_left=window - 1) if window else MaskSpec()
    edges = [0, tokens // 2, tokens] if case == "aligned" else [0, tokens]
    layout = make_layout(
        Documents.from_bounds(edges), 1, tokens, mesh, "contiguous" if case == "aligned" else "auto", (kind,)
    )
    torch.manual_seed(0)
    full = [torch.randn(1, tokens, heads, benchmark.WIDTH) for heads in (8, 4, 4)]
    q, k, v = (shard_tensor(x, layout).contiguous().requires_grad_() for x in full)
    measured = count(lambda: hf_usp.usp_attention(q, k, v, layout, sliding_window=window), torch.randn_like(q), 1)
    return measured.as_dict(), benchmark.predict(layout, kind, 4)


@pytest.mark.parametrize("case", ["causal", "window", "aligned"])
@pytest.mark.parametrize("degrees", [(1, 4), (4, 1), (2, 2)], ids=str)
def test_counts_are_what_the_plan_predicts(four_ranks: Ranks, degrees: tuple[int, int], case: str) -> None:
    everyone = four_ranks.run(counted, degrees, case, 2048)
    for measured, predicted in everyone:
        assert measured["all_to_alls"] == predicted["all_to_alls"]
        assert measured["messages"] == predicted["messages"]
        assert measured["all_to_alls_backward"] == predicted["all_to_alls"]
        assert measured["messages_backward"] == predicted["messages_backward"]
        assert measured["saved"] <= 1.01 * predicted["saved"]
        # Windows are cut into blocks of rows by the CPU kernel: at most an eighth more than the band.
        for way in ("area", "area_backward"):
            assert predicted["area"] <= measured[way] <= (1.125 if case == "window" else 1.002) * predicted["area"]
    for way in ("wire_forward", "wire_backward"):
        sent = sum(m[way] for m, _ in everyone)
        planned = sum(p[way] for _, p in everyone)
        # Messages have headers, and barriers are counted too.
        assert planned <= sent <= 1.01 * planned + 8000, (way, sent, planned)


def test_floors_of_the_exchange(four_ranks: Ranks) -> None:
    """Ulysses (2h + 2m)(1 - 1/U) u each way; causal zigzag ring 4.5 m (R - 1) u in all: 0.75 of the unpruned ring."""
    unit = 512 * 64 * 4
    for degrees, floor in [((1, 4), 2 * (2 * 8 + 2 * 4) * 0.75 * unit), ((4, 1), 4.5 * 4 * 3 * unit)]:
        everyone = four_ranks.run(counted, degrees, "causal", 2048)
        sent = sum(m["wire_forward"] + m["wire_backward"] for m, _ in everyone) / 4
        assert sent <= 1.01 * floor + 4000


def test_relayout_copies_of_the_ulysses_exchange(four_ranks: Ranks) -> None:
    """In units of one head of the local share: forward 2h + 2hk, each byte once on the way in or out.

    Backward h for dout and, since torch's kernels allocate what they return, (h + 2hk)(1 - 1/U) into the message and
    h + 2hk out of it; this rank's own tokens do not enter the message.
    """
    unit = 512 * 64 * 4
    for measured, _ in four_ranks.run(counted, (1, 4), "causal", 2048):
        assert measured["copied"] <= (2 * 8 + 2 * 4) * unit
        assert measured["copied_backward"] <= (8 + (8 + 2 * 4) * (2 - 1 / 4)) * unit


def test_aligned_documents_move_no_keys(four_ranks: Ranks) -> None:
    for measured, _ in four_ranks.run(counted, (2, 2), "aligned", 2048):
        assert measured["messages"] == 0


def peaks() -> list[dict[str, int]]:
    """Of this rank on meshes of one, two and four ranks, 256 tokens on each rank."""
    import memory

    return [row for world in (1, 2, 4) for row in memory.peaks(world, 256)]


def test_peak_memory(four_ranks: Ranks) -> None:
    """Over the same tokens in one process; what stands in the way of 1.10 for one call alone is in docs/limits.md."""
    everyone = four_ranks.run(peaks)
    worst = {
        (row["ring"], row["ulysses"]): [max(rows[i][what] for rows in everyone) for what in ("core", "step")]
        for i, row in enumerate(everyone[0])
    }
    core, step = ({mesh: found[i] / worst[1, 1][i] for mesh, found in worst.items()} for i in (0, 1))
    assert step[2, 1] <= 1.01 and step[4, 1] <= 1.01, step
    # Every layer keeps its output twice: by tokens for the next product, by heads for attention's backward.
    assert step[1, 2] <= 1.04 and step[1, 4] <= 1.04, step
    assert core[2, 1] <= 1.22 and core[4, 1] <= 1.65, core
    assert core[1, 2] <= 1.44 and core[1, 4] <= 1.44, core


def test_peak_memory_is_flat_in_the_ring() -> None:
    """Of every rank of rings of 8 and 16 ranks, 16 tokens on each: what is alive does not depend on the ranks."""
    from counting import Peak
    from virtual_ring import VirtualRing

    torch.manual_seed(0)
    worst = []
    for degree in (8, 16):
        tokens = 16 * degree
        tensors = [torch.randn(tokens, heads, 16) for heads in (8, 4, 4, 8)]
        ring = VirtualRing([0, tokens], degree, tensors, "cpu_flash")
        peaks, ring.mailbox.keep = [], False  # what arrives are zeros: only its size matters
        with ring.mailbox.replacing():
            ring.forward()
            for rank, (q, k, v, dout) in enumerate(ring.parts):
                ring.mailbox.begin("backward", rank)
                with Peak() as memory:
                    ring_backward(dout, q, k, v, None, *ring.kept[rank], ring.calls[rank])
                peaks.append(memory.peak)
        worst.append(max(peaks))
    assert worst[1] == worst[0], worst
