"""The report of `make book`, and its verdict on a run that memory ended."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import Any

import book
import pytest


def test_report_and_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = argparse.Namespace(tokens=131072, steps=3, limit_mb=1500)
    message = "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 1048576 bytes."

    def ended(stderr: str) -> Any:
        return lambda *a, **k: subprocess.CompletedProcess([], 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", ended(message))
    out = book.run("alone", args, tmp_path)
    assert out == {"ended": "can't allocate memory", "asked_mb": 1.0}
    monkeypatch.setattr(subprocess, "run", ended("ValueError: something else"))
    with pytest.raises(SystemExit, match="something else"):
        book.run("alone", args, tmp_path)
    trained = {"losses": [5.0, 4.0], "address_mb": 860.0, "resident_mb": 820.0, "seconds": 3.0}
    text = book.report({"plain": out, "alone": out, "mesh": trained}, args)
    assert "| one process, all savings | can't allocate memory (a further 1 MB) |" in text
    assert "| 4 processes, 2 x 2 | trained | 5.000, 4.000 | 860 | 820 | 3 |" in text
