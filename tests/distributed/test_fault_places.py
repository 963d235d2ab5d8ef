"""Some of the faults of `python -m tests.faults`: every rank ends, with the rank that failed and its cause."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ..faults.harness import endings

WAITED = "UspRankError: usp: another rank failed while this one waited for it: rank 1 "
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "killed in the forward": ({"place": "forward", "how": "kill"}, WAITED + "ended without leaving word"),
    "raised in the dataset": ({"place": "dataset"}, WAITED + "raised RuntimeError: boom at this place"),
    "stopped in the backward": (
        {"place": "backward", "how": "stop", "timeout": 6},
        WAITED + "did not answer for 6 s (it is stopped)",
    ),
    "raised in the backward, as if a connection were lost": (
        {"place": "backward", "how": "CUDA error: the launch timed out \udcff" + 10**6 * "x"},
        WAITED + "raised RuntimeError: CUDA error: the launch timed out \\udcff",
    ),
    "another cp_size": ({"other": {"cp_size": 1}}, "UspConfigError: usp: ranks that differ: cp_size is 1 on rank 1"),
    "another configuration": (
        {"model": {"sliding_window": 7}},
        "UspConfigError: usp: ranks that differ: config.sliding_window is 7 on rank 1, 9 on ranks 0, 2",
    ),
    "other weights": (
        {"seed": 5, "evaluate": True, "options": {"self_check": False}},
        "UspModelError: usp: MistralForCausalLM with other weights on rank 1",
    ),
}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", CASES)
def test_every_rank_ends_and_says_why(tmp_path: Path, name: str) -> None:
    case, said = CASES[name]
    found = endings(tmp_path, case, limit=150)
    place = case.get("place")
    for rank, ending in found.items():
        if rank == 1 and place is not None:
            assert "UspRankError" not in ending.said, ending
            continue
        assert ending.code == 1 and ending.seconds is not None, (rank, ending)
        assert ending.said.startswith(said), (rank, ending)
        assert place is None or ending.seconds < 30, ending
