"""The installed releases are a row of docs/versions.md, and a run says which part of the supported range it covers."""

from __future__ import annotations

import re

import pytest
from packaging.version import Version

from hf_usp.compat import OLDEST

from .versions import EVERY_RUN, PACKAGES, ROOT, installed, part_of_the_range, releases


def pins(file: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / file).read_text(), re.MULTILINE))


@pytest.mark.parametrize("package", PACKAGES)
def test_what_every_run_uses_is_what_the_page_says(package: str) -> None:
    known = releases()[package]
    of_every_run = [release for release, by in known.items() if by == EVERY_RUN]
    assert of_every_run == [pins("constraints.txt")[package]]
    if installed(package) == of_every_run[0]:
        return
    # Somebody tries another release: the lines at the head of the run say so.
    assert any(line.startswith(f"{package} {installed(package)} (") for line in part_of_the_range())


@pytest.mark.parametrize(("package", "oldest"), OLDEST)
def test_the_oldest_has_a_row(package: str, oldest: str) -> None:
    run = [Version(release) for release, by in releases()[package].items() if not by.startswith("not run")]
    assert min(run).base_version.startswith(f"{oldest}.")


def test_the_oldest_torch_is_what_make_installs() -> None:
    found = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found is not None and found[1].startswith(f"{dict(OLDEST)['torch']}.")


def test_a_run_says_its_part_of_the_range() -> None:
    lines = part_of_the_range()
    assert len(lines) == len(PACKAGES)
    assert re.fullmatch(r"torch [\d.]+ \(supported from 2\.11, run: 2\.11\.0, [\d., ]+\)(, a release .*)?", lines[0])
