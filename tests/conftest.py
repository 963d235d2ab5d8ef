"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from .ranks import Ranks
from .versions import part_of_the_range


def pytest_report_header() -> list[str]:
    """At the head of a run: which part of the supported range it covers."""
    return part_of_the_range()


def pytest_collection_finish() -> None:
    """Before the first test: cheap collections of garbage, and one thread, as in the ranks.

    Imported modules stay: each Trainer collects garbage, and need not walk through them (0.3 s). Threads that wait
    for tiny operations of each other spin: a Trainer of TRL takes 2.3 s of CPU time with two, 0.3 s with one.
    """
    gc.collect()
    gc.freeze()
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[int, Ranks]]:
    """The processes of all modules, by world size: started when first asked for, and again after a test kills one."""
    made = {size: Ranks(size) for size in (2, 4)}
    yield made
    for ranks in made.values():
        ranks.stop()


@pytest.fixture(scope="module")
def four_ranks(pools: dict[int, Ranks]) -> Ranks:
    """Four processes of one gloo group, as they were when they started."""
    pools[4].reset()
    return pools[4]


@pytest.fixture(scope="module")
def two_ranks(pools: dict[int, Ranks]) -> Ranks:
    """Two processes of one gloo group, as they were when they started."""
    pools[2].reset()
    return pools[2]
