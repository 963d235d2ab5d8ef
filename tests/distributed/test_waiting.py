"""A rank that computes a batch alone, or waits for a slow one, says so within seconds; the slow one is not lost."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import hf_usp
from hf_usp.distributed import waiting

from ..harness import fresh_accelerate
from ..harness import prepared as prepared_on_four
from ..ranks import Ranks
from ..tiny import batch_of, tiny_model


class Heard(logging.Handler):
    """The log of `hf_usp.distributed.waiting`, at the level that shows by default."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []
        logging.getLogger(waiting.__name__).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def prepared() -> tuple[Any, Any, Heard]:
    """An accelerator, a model of two ranks that has run once, and what it says from now on."""
    from accelerate import Accelerator

    fresh_accelerate()
    waiting.NOTE, waiting.PATIENCE = 0.2, 1.0
    accelerator = Accelerator(cpu=True, parallelism_config=hf_usp.UspParallelismConfig(cp_size=2))
    model = accelerator.prepare(tiny_model())
    accelerator.backward(model(**batch_of("right")).loss)
    return accelerator, model, Heard()


def slow() -> tuple[list[str], float, float]:
    """The second rank comes late; then the first one scores the batch alone, as the warning says it can."""
    accelerator, model, heard = prepared()
    batch = batch_of("right")
    if dist.get_rank() == 1:
        time.sleep(2.5)
    loss = accelerator.unwrap_model(model)(**batch).loss.item()  # else DDP waits first, to send its buffers
    alone = loss
    if accelerator.is_main_process:
        with torch.no_grad():
            alone = accelerator.unwrap_model(model).forward(**batch).loss.item()
    accelerator.wait_for_everyone()
    return heard.said, loss, alone


def test_a_late_rank_is_named_and_waited_for(two_ranks: Ranks) -> None:
    expected = tiny_model(attention="sdpa")(**batch_of("right")).loss.item()
    (said, *first), (nothing, *second) = two_ranks.run(slow)
    assert len(said) == 1 and nothing == []
    assert "rank 0 has waited for 1 s at the start of a sharded forward for rank(s) 1" in said[0]
    assert "accelerator.unwrap_model(model).forward(**batch) under torch.no_grad()" in said[0]
    assert [*first, *second] == pytest.approx([expected] * 4, abs=1e-6)


def alone() -> tuple[str, float]:
    """The first rank computes a batch that the other one never does."""
    from torch.distributed.distributed_c10d import _set_pg_timeout

    accelerator, model, _ = prepared()
    hooks = hf_usp.models.hooks.get_hooks(model)
    assert hooks is not None
    _set_pg_timeout(timedelta(seconds=3), hooks.mesh.group)
    start, message = time.monotonic(), ""
    if accelerator.is_main_process:
        with torch.no_grad(), pytest.raises(hf_usp.UspRankError) as refusal:
            accelerator.unwrap_model(model)(**batch_of("right"))
        message = str(refusal.value)
    accelerator.wait_for_everyone()
    return message, time.monotonic() - start


def test_the_error_at_the_time_limit_repeats_the_cause(two_ranks: Ranks) -> None:
    two_ranks.stop()  # other tests have left causes in its store
    (message, took), _ = two_ranks.run(alone)
    two_ranks.stop()  # its group has lost a message
    assert "until the time limit of the group, or the end of a rank, at the start of a sharded forward" in message
    assert "for rank(s) 1." in message and waiting.ALONE in message
    assert took < 30


def passes_by() -> str:
    """The first rank scores a batch alone while the others train on."""
    model, batch = prepared_on_four(), batch_of("plain")
    model(**batch)
    if dist.get_rank() == 0:
        batch["input_ids"] = batch["input_ids"].flip(1)
    with pytest.raises(hf_usp.UspBatchError) as refusal:
        model(**batch)
    return str(refusal.value)


def test_a_batch_of_one_rank_beside_that_of_others_is_told_the_same(four_ranks: Ranks) -> None:
    for message in four_ranks.run(passes_by):
        assert "differs" in message and waiting.ALONE in message
