"""Continuing with other rows, other batches or another model is refused; and the Trainer's ways of continuing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hf_usp.callbacks.resume import differences, look_at

from ..ranks import Ranks
from ..tiny import largest_difference, rows
from .training import train


def test_full_determinism_and_a_resume_that_is_watched(two_ranks: Ranks, tmp_path: Path) -> None:
    """No number that was never written is read: new memory holds NaN."""
    whole = two_ranks.run(train, str(tmp_path / "a"), True, full_determinism=True)
    settings = {"full_determinism": True, "restore_callback_states_from_checkpoint": True}
    resumed = two_ranks.run(train, str(tmp_path / "b"), True, str(tmp_path / "a" / "checkpoint-2"), **settings)
    for before, after in zip(whole, resumed, strict=True):
        assert not any(bool(p.isnan().any()) for p in before["weights"].values())
        assert largest_difference(after["weights"], before["weights"]) == 0
        assert after["seen"] == before["seen"][4:]


def test_data_that_is_not_skipped(two_ranks: Ranks, tmp_path: Path) -> None:
    folder, saved = str(tmp_path / "b"), str(tmp_path / "a" / "checkpoint-2")
    train(str(tmp_path / "a"), False)
    reference = train(folder, False, saved, ignore_data_skip=True)
    assert reference["seen"] != train(folder, False, saved)["seen"]
    for mine in two_ranks.run(train, folder, True, saved, ignore_data_skip=True):
        assert mine["seen"] == reference["seen"]
        assert largest_difference(mine["weights"], reference["weights"]) < 2e-5


# The change -> the words of the refusal.
OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "more rows": ({"count": 15}, "number of rows 14, here 15"),
    "other rows": ({"first": 1}, "checksum of sixteen rows"),
    "other batches": ({"accumulation": 1}, "rows a step 4, here 2"),
    "another rotary base": ({"changes": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}}, "rope_"),
    # Not watched: what the Trainer and torch say themselves.
    "wider, not watched": ({"changes": {"intermediate_size": 80}, "watched": False}, "size mismatch for model.layers"),
    "another layer, not watched": ({"changes": {"num_hidden_layers": 3}, "watched": False}, "doesn't match the size"),
}


def refusal(folder: str, saved: str, case: str) -> tuple[str, str]:
    """The error that ends this rank; the ranks meet afterwards, so none is left waiting."""
    try:
        train(folder, True, saved, **OTHER[case][0])
        ended = ("", "nothing was refused")
    except (ValueError, RuntimeError) as error:
        ended = (type(error).__name__, str(error))
    dist.barrier()
    return ended


def test_another_run_is_not_continued(two_ranks: Ranks, tmp_path: Path) -> None:
    two_ranks.run(train, str(tmp_path / "a"), True)
    for case, (changed, words) in OTHER.items():
        for kind, message in two_ranks.run(refusal, str(tmp_path / "b"), str(tmp_path / "a" / "checkpoint-2"), case):
            assert words in message, (case, message)
            assert (kind == "UspConfigError") == changed.get("watched", True)
    assert not (tmp_path / "b").exists() or not list((tmp_path / "b").glob("checkpoint-*"))


def test_what_is_looked_at() -> None:
    made = rows(40, 9)
    assert look_at(made) == look_at(rows(40, 9)) != look_at(made[::-1])
    tensors = [{name: torch.tensor(x) for name, x in row.items()} for row in made]
    assert look_at(tensors) == look_at(made)
    assert look_at(iter(made)) == {}
    assert look_at([]) == {"number of rows": 0, "checksum of sixteen rows": look_at([])["checksum of sixteen rows"]}
    run = {"rows a step": 4, "model": {"hidden_size": 8}}
    assert differences(run, run) == []
    assert differences(run, {"rows a step": 4, "model": {"tied": True}}) == [
        "model.hidden_size 8, here None",
        "model.tied None, here True",
    ]
