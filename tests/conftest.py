"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .ranks import Ranks
from .versions import part_of_the_range


def pytest_report_header() -> list[str]:
    """At the head of a run: which part of the supported range it covers."""
    return part_of_the_range()


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[Ranks]:
    """Four processes of one gloo group, alive for a module: every mesh that a test builds leaves threads behind."""
    ranks = Ranks(4)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """Two processes of one gloo group, alive for a module."""
    ranks = Ranks(2)
    yield ranks
    ranks.stop()
