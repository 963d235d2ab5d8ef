"""`benchmarks/gpu.py` without a GPU: every part runs, the virtual ring is exact, the report is whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from .launch import alone

SCRIPT = "benchmarks/gpu.py"


def test_without_a_gpu_it_refuses_and_writes_nothing(tmp_path: Path) -> None:
    ended = alone(SCRIPT, "--output", str(tmp_path / "results"))
    assert ended.returncode == 2
    assert "finds no CUDA device" in ended.stdout and "Traceback" not in ended.stdout
    assert not (tmp_path / "results").exists()


def test_rehearsal(tmp_path: Path) -> None:
    ended = alone(SCRIPT, "--device", "cpu", "--small", "--output", str(tmp_path))
    assert ended.returncode == 0, ended.stdout
    found = {path.suffix: path for path in tmp_path.iterdir()}
    assert set(found) == {".json", ".md", ".png"}
    kernels, tiles, rings, launches, longest = json.loads(found[".json"].read_text())["parts"].values()
    assert {row["case"] for row in kernels} == {"causal", "full", "packed"}
    assert len(tiles) == 12 and len(launches) == 1
    assert {(row["ranks"], row["case"]) for row in rings} == {(r, c) for r in (2, 4) for c in ("causal", "packed")}
    assert [row["outcome"] for row in longest] == ["trained"] * 4
    text = found[".md"].read_text()
    assert text.count("## ") == 5 and "Not run" not in text


@pytest.mark.parametrize("edges", [[0, 256], [0, 20, 90, 256]], ids=["causal", "packed"])
def test_virtual_ring_is_the_whole(edges: list[int]) -> None:
    """In fp64 the virtual ranks' outputs and gradients are those of one kernel call; a lost message would show."""
    from virtual_ring import VirtualRing

    torch.manual_seed(0)
    tensors = [torch.randn(256, heads, 16, dtype=torch.float64) for heads in (4, 2, 2, 4)]
    whole, ring = VirtualRing(edges, 1, tensors, "cpu_flash"), VirtualRing(edges, 4, tensors, "cpu_flash")
    with whole.mailbox.replacing():
        expected = whole.settle()
    with ring.mailbox.replacing():
        found = ring.settle()
    for mine, exact in zip(found, expected, strict=True):
        assert (mine - exact).abs().max() < 1e-12
