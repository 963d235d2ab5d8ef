"""Groups of a mesh wait as long as the process group, and are made once for all meshes of a process."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import hf_usp

from ..harness import fresh_accelerate
from ..ranks import Ranks

TIMEOUT = timedelta(seconds=60)  # of the process group of `Ranks`


@pytest.fixture(scope="module", autouse=True)
def no_groups_of_other_tests(pools: dict[int, Ranks]) -> None:
    """Libraries that other tests ran have made groups with times of their own."""
    for ranks in pools.values():
        ranks.stop()


def counts() -> tuple[int, int, int]:
    """Groups, files and threads of this process."""
    from torch.distributed.distributed_c10d import _world

    return len(_world.pg_map), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def timeouts() -> set[timedelta]:
    """Of all groups that there are."""
    from torch.distributed.distributed_c10d import _world

    return {group._get_backend(torch.device("cpu")).options._timeout for group in _world.pg_map}


def many_accelerators(cp_size: int) -> tuple[list[tuple[int, int, int]], set[timedelta]]:
    """Counts after each of four accelerators with a prepared model, as Trainers one after another make them."""
    from accelerate import Accelerator

    from ..tiny import batch_of, tiny_model

    found = []
    for _ in range(4):
        fresh_accelerate()
        config = hf_usp.UspParallelismConfig(cp_size=cp_size, ulysses_degree=1, self_check=False)
        model = Accelerator(parallelism_config=config).prepare(tiny_model())
        model.eval()
        with torch.no_grad():
            model(**batch_of("plain", length=12))
        found.append(counts())
    return found, timeouts()


def test_no_new_groups_for_another_trainer(two_ranks: Ranks) -> None:
    for found, waiting in two_ranks.run(many_accelerators, 2):
        assert len(set(found[1:])) == 1, found
        assert waiting == {TIMEOUT}


def test_nor_with_data_parallelism_around_the_mesh(four_ranks: Ranks) -> None:
    for found, waiting in four_ranks.run(many_accelerators, 2):
        assert len({groups for groups, _, _ in found}) == 1, found
        assert waiting == {TIMEOUT}


def anew(folder: str) -> list[int]:
    """The same mesh again, then in a second process group."""
    rank, world, sums = dist.get_rank(), dist.get_world_size(), []

    def use() -> hf_usp.UspMesh:
        mesh = hf_usp.UspMesh.build(ring_degree=world, ulysses_degree=1)
        total = torch.ones(1)
        dist.all_reduce(total, group=mesh.group)
        sums.append(int(total))
        return mesh

    first = use()
    assert use().group is first.group and use().ring_group is first.ring_group
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=TIMEOUT)
    second = use()
    assert second.group is not first.group
    return sums


def test_groups_of_a_process_group_that_is_gone_are_not_used(tmp_path: Path) -> None:
    ranks = Ranks(2)
    assert ranks.run(anew, str(tmp_path)) == [[2] * 4] * 2
    ranks.stop()
