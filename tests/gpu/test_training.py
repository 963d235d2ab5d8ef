"""The stock Trainer on two processes that share this GPU: what of training can only run on one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ..ranks import Ranks
from .staged import Sharing
from .training import CASES, MESHES, compare, train

pytestmark = pytest.mark.gpu


# A package that is not installed makes no check: `scripts/gpu_check.py` lists it with its reason.
CHECKS = [
    pytest.param(n, marks=pytest.mark.skipif(bool(c.missing()), reason=f"not installed: {', '.join(c.missing())}"))
    for n, c in CASES.items()
]


@pytest.fixture(scope="module")
def sharing(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sharing]:
    """Two processes on one device, alive for all cases."""
    ranks = Ranks(2)
    yield Sharing(ranks, device.type, tmp_path_factory.mktemp("store"))
    ranks.stop()


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes_equal_one(
    sharing: Sharing, tmp_path: Path, name: str, record_property: Callable[[str, object], None]
) -> None:
    case = CASES[name]
    one = train(str(tmp_path), "cuda", name, None)
    exact = train(str(tmp_path), "cuda", name, None, exact=True)
    if name.startswith("fp16"):
        assert one["scale"] is not None
    for mesh, ulysses in MESHES.items():
        parts = sharing.run(train, str(tmp_path), "cuda", name, ulysses)
        record_property(mesh, max(compare(mine, one, exact, case) for mine in parts))
