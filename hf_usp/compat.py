"""The one place that knows which versions are supported, and says so."""

from __future__ import annotations

import zlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.version import Version

from .errors import UspConfigError

OLDEST = (("torch", "2.11"), ("transformers", "5.17"), ("accelerate", "1.15"))


def check_versions() -> None:
    """Raise `UspConfigError` where a package that hf_usp builds on is missing or too old."""
    for package, oldest in OLDEST:
        remedy = f"pip install '{package}>={oldest}'"
        try:
            found = version(package)
        except PackageNotFoundError:
            raise UspConfigError(f"{package} is not installed", rule=f"{package} >= {oldest}", remedy=remedy) from None
        # Development and local builds ("2.11.0a0+git", "2.11.0+cpu") count as their release.
        if Version(Version(found).base_version) < Version(oldest):
            raise UspConfigError(f"{package} {found}", rule=f"{package} >= {oldest}", remedy=remedy)


def sources() -> str:
    """A checksum of the installed sources of hf_usp: the same version may be another state of a checkout."""
    total = 0
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        total = zlib.crc32(path.read_bytes(), zlib.crc32(path.relative_to(root).as_posix().encode(), total))
    return f"{total:08x}"
