"""Which releases of what hf_usp builds on are installed here, and which ones docs/versions.md says were run."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

from packaging.version import Version

from hf_usp.compat import OLDEST

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "versions.md"
EVERY_RUN = "`make test`"
PACKAGES = ("torch", "transformers", "accelerate", "trl", "peft", "deepspeed")


def installed(package: str) -> str:
    """The release, without what a build adds to it ("2.13.0+cpu")."""
    return Version(version(package)).base_version


def releases() -> dict[str, dict[str, str]]:
    """Package -> release -> who runs it: the rows of the page."""
    rows = re.findall(r"^\| (\w+) ([\d.]+) \| ([^|]+) \| [^|]+ \|$", PAGE.read_text(), re.MULTILINE)
    found: dict[str, dict[str, str]] = {package: {} for package in PACKAGES}
    for package, release, by in rows:
        found[package][release] = by
    return found


def part_of_the_range() -> list[str]:
    """One line a package: what runs here, of which range."""
    lines = []
    for package, known in releases().items():
        here = installed(package)
        run = sorted((release for release, by in known.items() if not by.startswith("not run")), key=Version)
        supported = f"supported from {dict(OLDEST)[package]}, " if package in dict(OLDEST) else ""
        new = "" if here in known else ", a release that docs/versions.md does not know"
        lines.append(f"{package} {here} ({supported}run: {', '.join(run)}){new}")
    return lines
