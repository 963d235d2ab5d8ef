"""Ranks that share a batch count as one process in Accelerate and the Trainer; no other module tells them.

The `state` of an accelerator of ours answers for a world whose processes are context-parallel groups: `num_processes`
is their number, and `parallelism_config` tells of no context parallelism. `gather` and `reduce` follow (gathering.py),
and so does the loss of a model that was given `num_items_in_batch` (loss.py). Whoever counts with an accelerator then
counts as over data parallelism alone. Ranks of tensor parallelism count, as in Transformers, which divides by them.

While it prepares models, loaders and optimizers, Accelerate sees the world as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState
from accelerate.utils.deepspeed import DummyScheduler  # accelerate.utils has it beside DeepSpeed alone
from torch.distributed.fsdp import FullStateDictConfig

from ..compat import prepared_schedulers, scheduler_steps
from ..utils.patches import AttributePatches


class GroupState(AcceleratorState):
    """An accelerator's state, with groups for processes; the same attributes otherwise."""

    def __init__(self, state: AcceleratorState) -> None:
        self.__dict__ = state.__dict__

    @property
    def num_processes(self) -> int:
        return self.__dict__["num_processes"] // self.__dict__["parallelism_config"].cp_size

    @property
    def parallelism_config(self) -> Any:
        return self.__dict__["parallelism_config"].of_groups()


class GroupIndexState(GroupState):
    """A state that also tells the number of this rank's group of `copies` ranks as that of its process."""

    __slots__ = ("copies",)  # not an attribute of the state itself

    def __init__(self, state: AcceleratorState, copies: int) -> None:
        super().__init__(state)
        self.copies = copies

    @property
    def process_index(self) -> int:
        return self.__dict__["process_index"] // self.copies


@contextmanager
def all_processes(accelerator: Accelerator) -> Iterator[None]:
    """While this lasts, the accelerator tells of all processes."""
    told = accelerator.state
    accelerator.state = AcceleratorState()
    try:
        yield
    finally:
        accelerator.state = told


def step_for_groups(accelerator: Accelerator, patches: AttributePatches) -> None:
    """Let the prepared schedulers take a step for each group, where Accelerate's take one for each process."""
    for scheduler in prepared_schedulers(accelerator):
        if type(scheduler) is AcceleratedScheduler:
            if not isinstance(vars(scheduler).get("step"), partial):
                patches.set(scheduler, "step", partial(_step, scheduler, accelerator))


def _step(prepared: AcceleratedScheduler, accelerator: Accelerator, *args: Any, **kwargs: Any) -> None:
    stock = AcceleratedScheduler.step
    if prepared.split_batches or not prepared.step_with_optimizer or not prepared.gradient_state.sync_gradients:
        stock(prepared, *args, **kwargs)
        return
    prepared.split_batches = True  # a call is one step then
    try:
        for _ in range(accelerator.num_processes):
            # As in Accelerate: OneCycleLR refuses steps after its last.
            if not hasattr(prepared.scheduler, "total_steps") or (
                scheduler_steps(prepared.scheduler) <= prepared.scheduler.total_steps
            ):
                stock(prepared, *args, **kwargs)
    finally:
        prepared.split_batches = False


def count_for_groups(scheduler: Any, model_parallel_size: int) -> Any:
    """A scheduler to be prepared. DeepSpeed's own divides its number of steps by the number of all processes."""
    if not isinstance(scheduler, DummyScheduler) or scheduler.total_num_steps is None:
        return scheduler
    scheduler = copy.copy(scheduler)
    scheduler.total_num_steps *= model_parallel_size
    return scheduler


class FirstRankOnly(FullStateDictConfig):
    """A full state dict, on the first rank and in CPU memory.

    Accelerate would have it on all ranks where the accelerator has one process, and then not load it under FSDP2.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, name in ("offload_to_cpu", "rank0_only") or value)


def keep_full_states_on_first_rank(accelerator: Accelerator, patches: AttributePatches) -> None:
    """Before an accelerator under FSDP tells of groups."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 2 and isinstance(plugin.state_dict_config, FullStateDictConfig):
        patches.set(plugin, "state_dict_config", FirstRankOnly())
