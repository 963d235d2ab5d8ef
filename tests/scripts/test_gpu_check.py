"""`scripts/gpu_check.py` where there is no GPU: it refuses clearly, and its report can be written."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.py"


def test_without_a_gpu_it_refuses_and_writes_nothing(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), "--output", str(tmp_path / "results")],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 2
    assert "finds no CUDA device" in ended.stderr and "Traceback" not in ended.stderr
    assert not (tmp_path / "results").exists()


def test_every_check_fails_without_a_gpu() -> None:
    """The checks are found without the project's pytest settings, and none is skipped for want of a device."""
    code = "import gpu_check as g; r = g.run_checks(); print(json.dumps([r.checks, r.left_out]))"
    ended = subprocess.run(
        [sys.executable, "-c", f"import json; {code}"],
        cwd=SCRIPT.parent.parent,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{SCRIPT.parent}:{SCRIPT.parent.parent}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    checks, left_out = json.loads(ended.stdout.splitlines()[-1])
    assert {"test_two_processes_equal_one[bf16]", "test_gradients_and_peak"} <= {check["check"] for check in checks}
    assert {check["outcome"] for check in checks} == {"failed"}
    assert all("finds no CUDA device" in check["reason"] for check in checks)
    assert all(reason.startswith("not installed: ") for reason in left_out.values())


def test_report() -> None:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    gpu_check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu_check)
    errors = dict.fromkeys(("out", "lse", "dq", "dk", "dv"), 0.001)
    checks = [
        {"check": "test_windows[cuda_flash-full]", "outcome": "passed", "errors": errors},
        {"check": "test_windows[cuda_flash-band]", "outcome": "passed", "errors": errors | {"dk": 0.25}},
        {"check": "test_windows[flash_attn-band]", "outcome": "failed", "reason": "too far off"},
    ]
    result = {"date": "2030-01-01", "device": "GPU", "compute_capability": "9.0", "memory_gib": 80.0, "cuda": "13.0"}
    result |= {"python": "3.12", "command": "c", "passed": 2, "total": 3, "seconds": 9, "versions": {"torch": "2.11"}}
    result |= {"kernels_bf16_128": {"flash_attn": "not installed", "cuda_flash": None}, "checks": checks}
    result |= {"left_out": {"test_two_processes_equal_one[8 bits]": "not installed: bitsandbytes"}}
    text = gpu_check.as_markdown(result | {"largest_errors": gpu_check.largest_errors(checks)})
    assert "| test_windows (cuda_flash) | 1.0e-03 | 1.0e-03 | 1.0e-03 | 2.5e-01 | 1.0e-03 |" in text
    assert "2 of 3 checks passed" in text and "- `test_windows[flash_attn-band]`" in text
    assert "| flash_attn | not installed |" in text and "| cuda_flash | yes |" in text
    assert "## Not checked\n\n- `test_two_processes_equal_one[8 bits]`: not installed: bitsandbytes" in text
