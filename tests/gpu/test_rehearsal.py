"""The checks of `test_training.py`, as far as it goes on CPU: the same processes, cases and comparison."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from ..ranks import Ranks
from .staged import Sharing
from .training import CASES, MESHES, compare, train

# PEFT 0.21 reads and calls names that Transformers 5.23 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
# Both meshes are rehearsed, a case on one of them.
REHEARSED = list(zip((n for n, c in CASES.items() if c.on_cpu), ("ring", "ulysses") * len(CASES), strict=False))


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sharing]:
    """Two processes of their own: their process group becomes another one."""
    ranks = Ranks(2)
    yield Sharing(ranks, "cpu", tmp_path_factory.mktemp("store"))
    ranks.stop()


@pytest.mark.parametrize("name, mesh", REHEARSED)
def test_the_cases_that_run_on_cpu(sharing: Sharing, tmp_path: Path, name: str, mesh: str) -> None:
    folder, case = str(tmp_path), CASES[name]
    one = train(folder, "cpu", name, None)
    exact = one if case.limit is not None else train(folder, "cpu", name, None, exact=True)
    for mine in sharing.run(train, folder, "cpu", name, MESHES[mesh]):
        compare(mine, one, exact, case)
    assert sharing.run(dist.get_backend) == ["staged", "staged"]
