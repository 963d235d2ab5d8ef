"""The notebook, its code cells run one after the other in a fresh process."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest

from .launch import ROOT, start, succeeded


@pytest.mark.timeout(180)
def test_the_notebook_prints_the_same_losses_twice(tmp_path: Path) -> None:
    cells = json.loads((ROOT / "notebooks" / "mesh_2x2.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code"), "committed without outputs"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = tmp_path / "cells.py"
    program.write_text("\n\n".join(code).replace("num_processes=4", f'num_processes=4, use_port="{port}"'))
    printed = re.findall(r"^\[.*\]$", succeeded(start(str(program))), re.M)
    assert len(printed) == 2
    mesh, alone = (json.loads(line) for line in printed)
    assert mesh == pytest.approx(alone, abs=1e-5) and len(mesh) == 3
