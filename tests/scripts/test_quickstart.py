"""The comparison that `make quickstart` and `make long` run, on a tiny text length."""

from __future__ import annotations

from pathlib import Path

import pytest
import quickstart

from .launch import start, succeeded

SAME = quickstart.Run([2.0, 1.5], [1.0, 1.0], 3.0)


@pytest.mark.timeout(240)
def test_long_on_a_short_sequence_prints_both_losses_and_draws_them(tmp_path: Path) -> None:
    # An absolute output folder stays outside the repository.
    flags = ["--preset", "long", "--output", str(tmp_path), "--extra", "--sequence_length 96 --max_steps 2"]
    printed = succeeded(start("scripts/quickstart.py", *flags, timeout=220))
    assert "ulysses 2 x ring 2; 4 query and 2 kv heads, split evenly" in printed
    assert "same losses: largest difference" in printed
    rows = [line.split() for line in printed.splitlines() if line.startswith(("   1   ", "   2   "))]
    assert len(rows) == 2
    for _, one, mesh, *_ in rows:
        assert float(one) == pytest.approx(float(mesh), abs=1e-5)
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_a_difference_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert quickstart.verdict(SAME, SAME, 1e-4) == 0
    for losses in ([2.0, 1.501], [2.0, float("nan")], [float("nan"), 1.5]):
        assert quickstart.verdict(SAME, quickstart.Run(losses, [1.0, 1.0], 3.0), 1e-4) == 1
    assert "DIFFERENT losses" in capsys.readouterr().out


def test_runs_of_different_length_are_not_compared() -> None:
    with pytest.raises(ValueError, match="shorter"):
        quickstart.verdict(SAME, quickstart.Run([2.0], [1.0], 3.0), 1e-4)
