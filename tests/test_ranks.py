"""The pools of ranks that all modules use: nothing of one module is left for the next, and a dead rank is replaced."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
import torch.distributed as dist

from hf_usp.distributed import waiting

from .ranks import RankError, Ranks


def state() -> tuple[object, ...]:
    """Of this rank: what a test can leave behind."""
    from accelerate.state import AcceleratorState

    return (
        dict(os.environ),
        list(warnings.filters),
        os.getcwd(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        waiting.PATIENCE,
        bool(AcceleratorState._shared_state),
    )


def careless(folder: str) -> None:
    """Leaves everything behind."""
    from accelerate import Accelerator

    Accelerator(cpu=True)
    os.environ["LOCAL_WORLD_SIZE"] = "7"
    os.chdir(folder)
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    waiting.PATIENCE = 0.1


def test_nothing_of_one_module_is_left_for_the_next(two_ranks: Ranks, tmp_path: os.PathLike[str]) -> None:
    before = two_ranks.run(state)
    two_ranks.run(careless, str(tmp_path))
    for changed, was in zip(two_ranks.run(state), before, strict=True):
        assert all(a != b for a, b in zip(changed, was, strict=True))
    two_ranks.reset()
    assert two_ranks.run(state) == before


def dies() -> None:
    if dist.get_rank() == 1:
        os._exit(1)
    dist.barrier()


def test_a_rank_that_dies_costs_a_restart(two_ranks: Ranks) -> None:
    with pytest.raises(RankError, match="died"):
        two_ranks.run(dies)
    assert not two_ranks.alive
    two_ranks.reset()
    assert two_ranks.run(dist.get_rank) == [0, 1]
