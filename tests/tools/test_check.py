"""`hf-usp check`: what it finds, by rules on plain numbers and on real ranks with a fault; its file and exit codes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from hf_usp.distributed.mesh import UspMesh
from hf_usp.tools.check.exactness import core_error, excess, shrink
from hf_usp.tools.check.issues import (
    PROBLEM,
    WARNING,
    Transfer,
    differing_versions,
    shared_devices,
    slow_links,
    span,
    wrong_placement,
)
from hf_usp.tools.cli import main

from ..scripts.launch import several

FAULTY = "tests/tools/faulty_check.py"
SMALL = "--dtype fp32 --heads 4 --kv-heads 2 --head-dim 16 --message 65536".split()


def test_one_process_with_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is sharded there, nothing is wrong."""
    assert main(["check", *SMALL, "--model", "configs/qwen3_small.json"]) == 0
    said = capsys.readouterr().out
    assert "2 comparison(s)" in said and said.rstrip().endswith("OK")


@pytest.mark.timeout(180)
def test_four_ranks_of_two_nodes(tmp_path: Path) -> None:
    """A whole run: ulysses across nodes is said with what fits; the file holds every figure; then plan reads it."""
    path = tmp_path / "check.json"
    result = several(
        4,
        "-m hf_usp",
        "check",
        *SMALL,
        "--ranks-per-node",
        "2",
        "--ulysses",
        "4",
        "--model",
        "configs/qwen3_small.json",
        "--output",
        str(path),
        "--soak-minutes",
        "0.01",
    )
    assert result.returncode == 0, result.stdout
    text = result.stdout
    assert "4 rank(s) on 2 node(s)" in text and "OK, " in text
    assert re.search(r"^kernel +cpu_flash, the first choice on this device$", text, re.MULTILINE)
    assert "WARNING: the ulysses group of ranks 0-3 lies on 2 nodes" in text
    assert re.search(r"soak +\d+ rounds", text)
    found = json.loads(path.read_text())
    assert found["exit_code"] == 0 and found["refused"] is None
    kinds = {(t["kind"], len(t["ranks"]), t["inside"]) for t in found["transfers"]}
    assert kinds == {
        ("pair", 2, True),
        ("pair", 2, False),
        ("all-to-all", 2, True),
        ("all-to-all", 4, False),
        ("ring", 2, False),
        ("ring", 4, False),
    }
    assert all(t["bandwidth"] > 0 and t["latency"] > 0 for t in found["transfers"])
    names = " ".join(found["exactness"])
    for expected in ("ulysses 1 x ring 4", "ulysses 2 x ring 2", "ulysses 4 x ring 1", "Qwen3 (small copy)"):
        assert expected in names
    assert max(found["exactness"].values()) <= 1
    assert [link["ranks"] for link in found["machine"]["links"]] == [2, 4]


@pytest.mark.timeout(180)
def test_a_cluster_with_many_faults(tmp_path: Path) -> None:
    """Ranks numbered across nodes in turn, a slow link, and a rank with another version that computes another thing."""
    path = tmp_path / "check.json"
    arguments = (*SMALL, "--ulysses", "2", "--output", str(path))
    result = several(4, FAULTY, "wrong", "3", "check", *arguments)
    assert result.returncode == 1, result.stdout
    text = result.stdout
    assert "4 rank(s) on 2 node(s)" in text and "NOT OK: " in text
    assert "PROBLEM: transformers is 5.17.0 on rank 3 (node1)" in text
    assert "PROBLEM: the ulysses group of ranks 0-1 lies on 2 nodes, although it would fit inside one" in text
    assert "slow link: pair inside a node, ranks 1, 3" in text
    assert re.search(r"PROBLEM: wrong: core, ulysses 2 x ring 2 errs \d+", text)
    assert json.loads(path.read_text())["exit_code"] == 1


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("fault", "rank", "said"),
    [
        ("hang", 1, "rank 1 hangs: in the stage 'exactness of the core, ulysses 1 x ring 2', at hang (faulty_check.py"),
        ("fail", 0, "rank 0 failed in the stage 'exactness of the core, ulysses 1 x ring 2': RuntimeError: out of mem"),
    ],
)
def test_a_rank_that_hangs_or_fails_is_named(fault: str, rank: int, said: str) -> None:
    result = several(2, FAULTY, fault, str(rank), "check", *SMALL, "--timeout", "12")
    assert f"PROBLEM: {said}" in result.stdout, result.stdout
    assert result.returncode == (3 if fault == "hang" else 1)


FACT: dict[str, Any] = {
    "host": "a",
    "device": "cuda H100",
    "device_index": 0,
    "versions": {"torch": "2.13", "flash-attn": "2.8"},
}


def test_versions_and_devices_that_differ() -> None:
    same = [FACT | {"device_index": i} for i in range(4)]
    assert differing_versions(same) == [] and shared_devices(same) == []
    odd = [*same[:3], {**same[3], "host": "b", "device": "cuda A100", "versions": {"torch": "2.12"}}]
    problems = [f.text for f in differing_versions(odd) if f.level == PROBLEM]
    assert problems == [
        "flash-attn is not installed on rank 3 (b), 2.8 on the others",
        "torch is 2.12 on rank 3 (b), 2.13 on the others",
    ]
    assert (
        "rank 3: cuda A100; ranks 0-2: cuda H100" in [f.text for f in differing_versions(odd) if f.level == WARNING][0]
    )
    assert "4 ranks use GPU 0 of a" in shared_devices([FACT] * 4)[0].text


@pytest.mark.parametrize(
    ("nodes", "ulysses", "level", "said"),
    [
        ("aaaabbbb", 4, None, ""),
        ("aaaabbbb", 1, None, ""),
        ("abababab", 2, PROBLEM, "although it would fit inside one: consecutive ranks are on different nodes"),
        ("aaaabbbb", 8, WARNING, "larger than a node (4 ranks)"),
        ("aaabbb", 2, PROBLEM, "although a node has 3 ranks: 2 does not divide them"),
    ],
)
def test_ulysses_across_nodes(nodes: str, ulysses: int, level: str | None, said: str) -> None:
    found = wrong_placement(list(nodes), len(nodes), ulysses)
    assert [f.level for f in found] == ([] if level is None else [level])
    assert not found or said in found[0].text


def ways(**slow: float) -> list[Transfer]:
    """All pairs of eight ranks of one node, 10 GB/s each but those named "0-3"."""
    return [
        Transfer("pair", (i, j), True, 1e-5, slow.get(f"r{i}_{j}", 10e9)) for i in range(8) for j in range(i + 1, 8)
    ]


def test_a_slow_link_and_a_slow_rank() -> None:
    assert slow_links(ways(), 0.5) == []
    (link,) = slow_links(ways(r2_5=3e9), 0.5)
    assert "slow link: pair inside a node, ranks 2, 5, 3.00 GB/s; others have 10.00 GB/s" in link.text
    (rank,) = slow_links(ways(**{f"r{min(i, 4)}_{max(i, 4)}": 2e9 for i in range(8) if i != 4}), 0.5)
    assert rank.text.startswith("rank 4 is slow")
    two = [Transfer("pair", (0, 1), True, 1e-5, 10e9), Transfer("pair", (2, 3), True, 1e-5, 3e9)]
    assert slow_links(two, 0.5) == [] and len(slow_links([two[0], replace(two[1], bandwidth=2e9)], 0.5)) == 1
    across = [Transfer("pair", (i, i + 8), False, 1e-5, 1e9) for i in range(8)]
    assert slow_links(ways() + across, 0.5) == [], "ways across nodes are compared with their like"


def test_ranks_in_words() -> None:
    assert span([3]) == "rank 3" and span([8, 0, 1, 2]) == "ranks 0-2, 8"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_process_is_exact(dtype: torch.dtype) -> None:
    mesh = UspMesh.build(ring_degree=1, ulysses_degree=1)
    assert core_error(mesh, torch.device("cpu"), dtype, (6, 3, 16)) <= 1


def test_an_error_of_a_percent_or_nan_is_no_rounding() -> None:
    truth = torch.linspace(-1, 1, 50)
    assert excess(truth, truth, truth) == 0
    assert excess(truth * 1.01, truth, truth) > 1
    assert excess(torch.full((50,), float("nan")), truth, truth) == float("inf")


def test_the_small_copy_keeps_heads_widths_and_kinds_of_layers() -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = AutoConfig.for_model(
        "gemma3_text", num_hidden_layers=12, layer_types=kinds * 2, num_attention_heads=8, head_dim=256
    )
    small = shrink(config)
    assert small.layer_types == kinds and small.num_hidden_layers == 6
    assert (small.num_attention_heads, small.head_dim, small.vocab_size) == (8, 256, 512)
    assert config.num_hidden_layers == 12, "the user's config is left alone"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--ulysses 3", "choose ulysses_degree from 1"),
        ("--cp-size 2", "cp_size = 2 in a world of 1"),
        ("--heads -4", "heads=-4"),
        ("--dtype fp8", "fp8"),
        ("--timeout 0", "timeout=0"),
        ("--soak-minutes -1", "a soak of -1.0 minutes"),
        ("--soak-minutes nan", "a soak of nan minutes"),
        ("--slow 2", "slow=2.0"),
        ("--model no/such-model", "no config of 'no/such-model' on this machine"),
        ("--output no/such/folder/file.json", "No such file or directory"),
    ],
)
def test_bad_input(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert main(["check", *arguments.split()]) == 2
    assert said in capsys.readouterr().err
