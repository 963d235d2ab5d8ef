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
    """Every part runs and leaves its own result, with what was predicted beside what was measured."""
    import gpu

    ended = alone(SCRIPT, "--device", "cpu", "--small", "--output", str(tmp_path))
    assert ended.returncode == 0, ended.stdout
    rows = {}
    for name in gpu.PARTS:
        (found,) = tmp_path.glob(f"*-cpu-{name}.json")
        rows[name] = json.loads(found.read_text())["rows"]
        text = found.with_suffix(".md").read_text()
        assert rows[name] and "Not run" not in text and f"--part {name}" in text and "Predicted: " in text, name
        assert name in ("host", "longest") or any(key.startswith("predicted") for key in rows[name][0]), name
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}
    assert {row["case"] for row in rows["kernels"]} == {"causal", "full", "packed"}
    assert {row["kernel"] for row in rows["rates"]} == {"cpu_flash", "blockwise"}
    rings = {(row["ranks"], row["case"]) for row in rows["ring"]}
    assert rings == {(ranks, case) for ranks in (2, 4) for case in ("causal", "packed")}
    assert [row["waits"] for row in rows["waits"]] == [row["predicted"] for row in rows["waits"]]
    assert all(0.9 < row["GB"] / row["predicted (simulated)"] < 1.1 for row in rows["memory"]), rows["memory"]
    assert [row["outcome"] for row in rows["longest"]] == ["trained"] * 4


def test_one_part_alone(tmp_path: Path) -> None:
    ended = alone(SCRIPT, "--device", "cpu", "--small", "--part", "copies", "--output", str(tmp_path))
    assert ended.returncode == 0, ended.stdout
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md"]


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
