"""A rank that fails alone ends all ranks, each with that cause."""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import hf_usp
from hf_usp.distributed import failures as faults

from ..harness import fresh_accelerate, training_arguments
from ..ranks import RankError, Ranks
from ..tiny import rows, tiny_model

FAILING, MEMORY = 2, "CUDA out of memory. Tried to allocate 20 GiB (simulated)"


def fails_at(model: Any, where: str) -> None:
    """Make the second layer raise on one rank, from the third call on: after the self-check, in the middle of a run."""
    layer, calls = model.model.layers[1], [0]
    problem: Exception = torch.OutOfMemoryError(MEMORY)
    if where == "refusal":
        problem = hf_usp.UspKernelError(MEMORY, rule="tiles fit into memory", remedy="take shorter rows")

    def fail(*args: Any) -> None:
        calls[0] += where == "backward" or torch.is_grad_enabled()
        if calls[0] >= 3 and dist.get_rank() == FAILING:
            raise problem

    if where == "backward":
        layer.mlp.register_full_backward_hook(fail)
    else:
        layer.mlp.register_forward_hook(fail)


def run(folder: str, mesh: tuple[int, int], where: str, finds_batch_size: bool) -> None:
    """The stock Trainer; a rank that ends writes why, and its process ends."""
    from transformers import Trainer

    fresh_accelerate()
    model = tiny_model()
    fails_at(model, where)
    args = training_arguments(
        folder,
        max_steps=4,
        parallelism_config=hf_usp.UspParallelismConfig(cp_size=mesh[0], ulysses_degree=mesh[1]),
        save_strategy="no",
        per_device_train_batch_size=2,
        auto_find_batch_size=finds_batch_size,
    )
    try:
        Trainer(model=model, args=args, train_dataset=rows(16, 33)).train()
        why = "nothing"
    except Exception:
        why = traceback.format_exc()
    rank, here = dist.get_rank(), Path(folder)
    (here / f"rank{rank}.part").write_text(why)
    (here / f"rank{rank}.part").rename(here / f"rank{rank}")
    while rank == 0 and len(list(here.glob("rank?"))) < 4:  # it has the store, which a launcher keeps otherwise
        time.sleep(0.05)
    os._exit(1)


@pytest.mark.parametrize(
    ("mesh", "where", "finds_batch_size"),
    [((4, 2), "forward", False), ((2, 2), "backward", False), ((4, 1), "forward", True), ((4, 2), "refusal", False)],
    ids=str,
)
def test_every_rank_ends_with_the_cause(
    tmp_path: Path, mesh: tuple[int, int], where: str, finds_batch_size: bool
) -> None:
    ranks = Ranks(4)
    with pytest.raises(RankError, match="died"):
        ranks.run(run, str(tmp_path), mesh, where, finds_batch_size)
    for rank in range(4):
        why = (tmp_path / f"rank{rank}").read_text()
        last = why.strip().splitlines()[-1]
        assert "out of memory" in last, why
        if rank != FAILING:
            assert f"UspRankError: usp: another rank failed while this one waited for it: rank {FAILING} raised" in last
        elif finds_batch_size:
            assert "UspRankError: usp: a forward after this rank failed" in last and "auto_find_batch_size" in last
        else:
            assert last.startswith("hf_usp.errors.UspKernelError" if where == "refusal" else "torch.OutOfMemoryError")


@pytest.mark.parametrize(
    ("problem", "lost"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:5315"), True),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 12000ms for recv operation"), True),
        (dist.DistBackendError("NCCL communicator was aborted on rank 1."), True),
        (dist.DistStoreError("wait timeout after 12000ms, keys: /1"), True),
        (RuntimeError("CUDA error: the launch timed out and was terminated"), False),
        (RuntimeError("no connection between this layer and the loss"), False),
        (ValueError("gloo: connection closed by peer"), False),
    ],
    ids=str,
)
def test_only_a_backend_loses_connections(problem: Exception, lost: bool) -> None:
    assert faults.lost_connection(problem) is lost


def test_the_last_word_of_a_process_can_be_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[BaseException] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, problem, trace: seen.append(problem))
    before = sys.excepthook
    faults.expect_failures()
    hook = sys.excepthook
    faults.expect_failures()
    assert isinstance(hook, faults.LastWord) and sys.excepthook is hook
    problem = RuntimeError("no process group, no word")
    hook(RuntimeError, problem, None)
    assert seen == [problem]
    hook.remove()
    assert sys.excepthook is before
