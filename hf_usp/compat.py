"""The one place that knows which versions are supported, and says so."""

from __future__ import annotations

import zlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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


def get_reshard_state(unit: Any) -> tuple[Any, Any]:
    """What an FSDP2 unit does with its parameters after a forward; torch 2.11 to 2.14 have no public getter."""
    state = unit._get_fsdp_state()
    group = state._fsdp_param_group
    return state._auto_reshard_after_forward, None if group is None else group.post_forward_mesh_info


def set_reshard_state(unit: Any, before: tuple[Any, Any]) -> None:
    """Put back what `get_reshard_state` returned."""
    state = unit._get_fsdp_state()
    state._auto_reshard_after_forward = before[0]
    if state._fsdp_param_group is not None:
        state._fsdp_param_group.post_forward_mesh_info = before[1]
