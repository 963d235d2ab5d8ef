"""The oldest supported Transformers: rows of the table and the interfaces in which its versions differ.

It lives in a directory of its own (`make setup` installs it), which a process of its own puts before the environment's
packages. `make table-oldest` runs the whole table with it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_usp.compat import OLDEST

ROOT = Path(__file__).parents[2]
PACKAGES = Path(sys.prefix) / "oldest"
# One of each kind: sinks, chunks, latent attention, a rope that sees the length, the gated delta rule, Mamba-2, both
# directions, lightning attention, keys that are selected.
ROWS = (
    "gpt_oss",
    "llama4_text",
    "deepseek_v3",
    "phi3/longrope",
    "qwen3_next",
    "mamba2",
    "bert/both directions",
    "minimax",
    "deepseek_v32",
)


COUNTS = "tests/integrations/test_token_counts.py::test_tokens_not_averaged_over_devices[(4, 2)-1]"


@pytest.fixture(scope="module")
def printed() -> str:
    """Output of all these tests in one process with the oldest Transformers."""
    assert (PACKAGES / "transformers").is_dir(), f"run make setup: no Transformers {OLDEST[1][1]} in {PACKAGES}"
    environment = {**os.environ, "PYTHONPATH": f"{PACKAGES}{os.pathsep}{ROOT}"}
    rows = [f"tests/models/test_census.py::test_exact_or_refused[{row}]" for row in ROWS]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *rows]
    command += ["tests/models/test_upstream.py", COUNTS]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    return result.stdout


def test_it_is_the_oldest() -> None:
    pinned = re.search(r"^transformers==(\S+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE)
    assert pinned is not None and pinned[1].startswith(f"{dict(OLDEST)['transformers']}.")
    assert (PACKAGES / f"transformers-{pinned[1]}.dist-info").is_dir(), "run make setup"


@pytest.mark.timeout(300)
def test_rows_of_the_table(printed: str) -> None:
    passed = re.findall(r"::test_exact_or_refused\[(.+)\] PASSED", printed)
    assert passed == list(ROWS)


@pytest.mark.timeout(300)
def test_masks_keywords_and_token_counts(printed: str) -> None:
    assert "tests/models/test_upstream.py::" in printed and f"{COUNTS} PASSED" in printed
