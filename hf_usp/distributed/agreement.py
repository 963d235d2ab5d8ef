"""Options, versions and settings that must be the same on all ranks: compared once, before anything depends on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..compat import installed_version, sources
from ..errors import UspConfigError
from .comm import all_gather_objects
from .failures import on_every_rank

PACKAGES = ("hf_usp", "torch", "transformers", "accelerate")
MOST = 8  # differences, and ranks, in one message
LONGEST = 200  # characters of a value there


def versions() -> dict[str, str]:
    """Of hf_usp and what it builds on; of hf_usp the sources too, for a checkout may be in any state."""
    found = {"sources of hf_usp": sources()}
    for package in PACKAGES:
        found[f"version of {package}"] = installed_version(package) or "not installed"
    return found


def verify_same_on_all_processes(mine: Mapping[str, Any]) -> None:
    """Raise `UspConfigError` on every rank of the world unless all have the same values; all of them call this.

    Values are compared as `repr` shows them. The exchange goes over the default process group: sizes may differ, and
    with them every other group.
    """
    said = all_gather_objects({name: repr(value) for name, value in mine.items()})
    names = dict.fromkeys(name for one in said for name in one)
    found = [name for name in names if len({one.get(name) for one in said}) > 1]
    if found:
        more = f"; and {len(found) - MOST} more" if len(found) > MOST else ""
        raise on_every_rank(
            UspConfigError(
                "ranks that differ: " + "; ".join(f"{name} is {_by_rank(name, said)}" for name in found[:MOST]) + more,
                rule="all ranks of a run have the same versions, options, model and settings",
                remedy=f"give every rank the same {', '.join(found[:MOST])} (launch line, environment, files and "
                "installed packages of every node)",
            )
        )


def _by_rank(name: str, said: list[dict[str, str]]) -> str:
    """`'zigzag' on rank 2, 'auto' on ranks 0, 1, 3`: rare ones first."""
    holders: dict[str, list[int]] = {}
    for rank, one in enumerate(said):
        holders.setdefault(one.get(name, "not there"), []).append(rank)
    values = sorted(holders.items(), key=lambda held: len(held[1]))
    return ", ".join(f"{value[:LONGEST]} on {named(ranks)}" for value, ranks in values[:MOST])


def named(ranks: list[int]) -> str:
    """`rank 2`, `ranks 0, 1, 3`, and of many the first ones."""
    more = f" and {len(ranks) - MOST} more" if len(ranks) > MOST else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:MOST]))}{more}"
