"""CUDA kernels against the definition, training against one process, on this machine's GPU, into a dated result file.

    pip install torch transformers accelerate pytest
    python scripts/gpu_check.py                       # or: make gpu
    python scripts/gpu_check.py --output results/gpu  # the default

Expected: all checks pass in 2 to 5 minutes on one GPU of compute capability 8.0 or newer, and
results/gpu/<date>-<device>.json and .md say so, with versions, hardware and the largest errors. The flash-attn package
and what trains with other optional packages is checked too where they are installed, else listed as not checked. Exit
code 0: all passed; 1: a check failed; 2: nothing could be checked. No GPU has run it yet.

The checks themselves are tests/gpu (`pytest -m gpu tests/gpu`); this script runs them and writes down what they found.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "kernels",
    "pytest",
    "numpy",
)
# In the names of checks; hf_usp.kernels.KERNELS has the same, but needs torch to be imported.
KERNEL_NAMES = ("flash_attn", "cuda_flash", "fa3", "fa4", "cudnn", "efficient", "blockwise")


class Recorder:
    """A pytest plugin that keeps the outcome of every check, and why others cannot run on this machine."""

    def __init__(self) -> None:
        self.checks: list[dict[str, Any]] = []
        self.left_out: dict[str, str] = {}

    def pytest_configure(self, config: Any) -> None:
        config.addinivalue_line("markers", "gpu: needs a CUDA device")

    def pytest_runtest_logreport(self, report: Any) -> None:
        # A condition known beforehand (`skipif`) says what a machine lacks; a skip from within a check is no pass.
        if report.when == "setup" and report.skipped:
            self.left_out[report.nodeid.rpartition("::")[2]] = report.longrepr[2].removeprefix("Skipped: ")
        # A passed setup or teardown is no result of its own; a failed one is.
        elif report.when == "call" or report.failed:
            check = {"check": report.nodeid.rpartition("::")[2], "outcome": report.outcome}
            check |= {"seconds": round(report.duration, 3), **dict(report.user_properties)}
            if report.failed:
                check["reason"] = str(report.longrepr)[-2000:]
            self.checks.append(check)


def run_checks() -> Recorder:
    """Runs tests/gpu without the project's pytest settings, whose plugins a GPU machine need not have."""
    import pytest

    recorder = Recorder()
    arguments = ["-c", os.devnull, "--rootdir", str(ROOT), "--confcutdir", str(ROOT / "tests" / "gpu")]
    arguments += ["-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu")]
    pytest.main(arguments, plugins=[recorder])
    return recorder


def describe() -> dict[str, Any]:
    """Hardware and versions."""
    import torch

    from hf_usp.kernels import KERNELS, Request, Softmax

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    device = torch.device("cuda", torch.cuda.current_device())
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": versions,
        "kernels_bf16_128": {
            name: kernel.why_not(Request(device, torch.bfloat16, 128, 128, Softmax(0.1)))
            for name, kernel in KERNELS.items()
        },
    }


def largest_errors(checks: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per test function and kernel, the largest relative error of each tensor (lse: absolute)."""
    worst: dict[str, dict[str, float]] = defaultdict(dict)
    for check in checks:
        name, _, parameters = check["check"].partition("[")
        kernel = next((k for k in KERNEL_NAMES if k in parameters.replace("]", "-").split("-")), "chosen")
        for tensor, error in check.get("errors", {}).items():
            row = worst[f"{name} ({kernel})"]
            row[tensor] = max(row.get(tensor, 0.0), error)
    return dict(worst)


def as_markdown(result: dict[str, Any]) -> str:
    lines = [
        f"# GPU check, {result['date']}, {result['device']}",
        "",
        f"`{result['command']}`: {result['passed']} of {result['total']} checks passed in {result['seconds']} s.",
        "",
        f"Compute capability {result['compute_capability']}, {result['memory_gib']} GiB, CUDA {result['cuda']}, "
        f"Python {result['python']}, " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()) + ".",
        "",
        "| kernel (bf16, head width 128) | usable |",
        "| --- | --- |",
        *(f"| {name} | {reason or 'yes'} |" for name, reason in result["kernels_bf16_128"].items()),
        "",
        "Largest errors against the fp64 oracle, relative to the tensor's largest entry (lse: absolute). Allowed:",
        "twice those of plain torch in the same dtype.",
        "",
        "| check | out | lse | dq | dk | dv |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result["largest_errors"].items():
        lines.append(f"| {name} | " + " | ".join(f"{row[t]:.1e}" for t in ("out", "lse", "dq", "dk", "dv")) + " |")
    failed = [check for check in result["checks"] if check["outcome"] != "passed"]
    lines += ["", "## Failed", "", *(f"- `{check['check']}`" for check in failed)] if failed else []
    left_out = [f"- `{check}`: {reason}" for check, reason in result["left_out"].items()]
    lines += ["", "## Not checked", "", *left_out] if left_out else []
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Check every CUDA kernel of hf_usp on the GPU of this machine.")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "gpu", help="folder of the result files")
    output: Path = parser.parse_args().output
    try:
        import torch
    except ImportError:
        print("gpu_check: torch is not installed. Install it with: pip install torch", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print(
            f"gpu_check: torch {torch.__version__} finds no CUDA device, so there is nothing to check here.\n"
            "Run it on a machine with an NVIDIA GPU and a CUDA build of torch. `make test` needs no GPU.",
            file=sys.stderr,
        )
        return 2
    sys.path.insert(0, str(ROOT))
    start = time.monotonic()
    result = {"date": datetime.now(UTC).date().isoformat(), "command": "python scripts/gpu_check.py"} | describe()
    recorder = run_checks()
    checks = recorder.checks
    passed = sum(check["outcome"] == "passed" for check in checks)
    result |= {"passed": passed, "total": len(checks), "seconds": round(time.monotonic() - start)}
    result |= {"largest_errors": largest_errors(checks), "left_out": recorder.left_out, "checks": checks}
    output.mkdir(parents=True, exist_ok=True)
    stem = output / f"{result['date']}-{re.sub(r'[^a-z0-9]+', '-', str(result['device']).lower()).strip('-')}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(as_markdown(result))
    for check, reason in recorder.left_out.items():
        print(f"not checked: {check}: {reason}")
    print(f"{passed} of {len(checks)} checks passed; written: {stem}.json and .md")
    return 0 if checks and passed == len(checks) else 1


if __name__ == "__main__":
    sys.exit(main())
