"""A short part of each fuzzer: nothing ends in a raw error or a hang, and some inputs are accepted."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from .driver import judge, try_all
from .run import PLAN, fuzzers

COUNTS = {"finetune": 3, "check": 6, "rows": 40, "plan": 60, "explain": 60, "attention": 150}


@pytest.mark.parametrize("name", PLAN)
def test_every_ending_is_known(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tally = try_all(fuzzers(tmp_path)[name], 7, COUNTS.get(name, 300), 60, PLAN[name][2])
    assert not tally.raw, "\n".join(tally.raw.values())
    assert tally.ended["refused"]
    assert not (tmp_path / "ran").exists(), "code of a model was run"


def test_the_driver_tells_endings_apart() -> None:
    assert judge(lambda: int("x"))[0] == "raw"
    assert judge(lambda: 2)[0] == "refused" and judge(lambda: 0)[0] == "accepted"
