"""Trainers that sample completions of prompts and compare them (TRL's GRPO, RLOO, distillation, OnlineDPO, SDPO).

- Their sampler hands out a chunk of prompts several times and counts the rows of a chunk by processes. Here a chunk has
  the rows of all groups of ranks that share a batch.
- The completions of a prompt are compared by their place among the gathered rewards. So a group of ranks holds all of
  them, or none.
- Rewards are gathered over all processes, by a function of `accelerate.utils` that knows no groups. Copies of whole
  blocks change no mean and no advantage; they do change a standard deviation over all rewards, which divides by the
  number of rewards less one.
- SDPO gathers rows by its accelerator, which hands out those of a group once, and finds its own by the number of its
  process. Here it finds them by the number of its group. So do clients of a vLLM server, which gather the prompts of
  all processes: the server gets those of a group once, and every rank of it the same completions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather, gather_object
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..compat import DEVIATION, GATHER, OWN_REWARDS, REWARDS, SCORING, SLICING, is_repeat_sampler, modules_of
from ..distributed.agreement import named
from ..distributed.comm import world_size
from ..distributed.failures import on_every_rank
from ..errors import UspBatchError, UspConfigError
from ..utils.patches import AttributePatches
from .process_groups import GroupIndexState


def repeat_for_groups(loader: DataLoader, groups: int, patches: AttributePatches) -> None:
    """Make a loader of repeated prompts, not yet prepared, count the rows of a chunk by `groups` of ranks.

    Raises `UspConfigError` where the completions of a prompt would lie on several groups, or a chunk fits no batches.
    """
    sampler: Any = getattr(loader.batch_sampler, "sampler", None)
    if not is_repeat_sampler(sampler) or loader.batch_size is None:
        return
    each, rows = sampler.mini_repeat_count, loader.batch_size
    if rows % each:
        raise UspConfigError(
            f"{each} completions of each prompt in batches of {rows} rows on every data-parallel rank",
            rule="the completions of a prompt are compared with each other, on the ranks that share their batch",
            remedy=f"choose per_device_train_batch_size x steps_per_generation (in evaluation "
            f"per_device_eval_batch_size) as a multiple of num_generations={each}",
        )
    if sampler.repeat_count == 1 and sampler.batch_size == 1:
        return  # nothing is handed out several times: an evaluation
    chunk = sampler.batch_size * each
    if chunk % (rows * groups):
        raise UspConfigError(
            f"prompts that are repeated in chunks of {chunk} rows, for {groups} data-parallel rank(s) with batches of "
            f"{rows} rows",
            rule="a chunk of prompts is one batch of every data-parallel rank",
            remedy="leave generation_batch_size out, and give steps_per_generation",
        )
    patches.set(sampler, "batch_size", rows * groups // each)


def check_streamed_prompts(trainer: Any, loader: DataLoader, groups: int) -> None:
    """Refuse a stream of prompts whose repeats were counted by processes, before it came here."""
    args: Any = getattr(trainer, "args", None)
    counted, steps = (getattr(args, name, None) for name in ("generation_batch_size", "steps_per_generation"))
    if not isinstance(loader.dataset, IterableDataset) or not counted or not steps:
        return
    right = args.per_device_train_batch_size * groups * steps
    if counted != right:
        raise UspConfigError(
            f"a stream of prompts that are repeated in chunks of {counted} rows, for {right} rows of a generation",
            rule="ranks that share a sequence share its prompts; a chunk of a stream is counted by processes",
            remedy=f"set args.generation_batch_size = {right} after making the config, or load the prompts as a "
            "dataset with a length",
        )


def count_once(trainer: Any, copies: int, patches: AttributePatches) -> None:
    """Let a trainer that gathers rewards count those of `copies` ranks that share rows once.

    Standard deviations over all gathered rewards do, and rows that are found by the number of a process. Rewards of
    ranks that share rows are compared, unless the first rank's are the ones that are used.

    Raises `UspConfigError` for an engine in each process: it would sample other completions on every rank of a group.
    """
    args = getattr(trainer, "args", None)
    if getattr(args, "use_vllm", False) and getattr(args, "vllm_mode", "") == "colocate":
        raise UspConfigError(
            f'vllm_mode="colocate" with batches that {copies} ranks share',
            rule="ranks that share a batch train on the same completions; an engine in each of them samples others",
            remedy='give vllm_mode="server"; or leave use_vllm out, and sample with '
            'UspParallelismConfig(generate="rows")',
        )
    scoring = modules_of(trainer, SCORING, DEVIATION)
    functions: dict[tuple[Any, str], Callable[..., Any]] = {}
    if scoring:
        functions = {(trainer, SCORING): partial(_score, scoring), (trainer, REWARDS): _agreed_rewards}
    elif hasattr(trainer, OWN_REWARDS):
        functions = {(trainer, OWN_REWARDS): _agreed_own_rewards}
    for owner in (trainer, getattr(trainer, "vllm_generation", None)):
        for name in SLICING:
            if modules := modules_of(owner, name, GATHER):
                functions[owner, name] = partial(_sliced, trainer.accelerator, modules)
    for (owner, name), function in functions.items():
        if not isinstance(vars(owner).get(name), partial):
            patches.set(owner, name, partial(function, getattr(owner, name), copies))


def _agreed_own_rewards(stock: Callable[..., Tensor], copies: int, *args: Any, **kwargs: Any) -> Tensor:
    """The rewards of this rank's rows [rows], of ranks that agree on theirs. Raises as `_agreed_rewards`."""
    rewards = stock(*args, **kwargs)
    _agreed_rewards(gather, copies, rewards[:, None])
    return rewards


def _agreed_rewards(stock: Callable[..., Tensor], copies: int, *args: Any, **kwargs: Any) -> Tensor:
    """The rewards of all processes [rows, functions], which every rank gets, of ranks that agree on theirs.

    Raises `UspBatchError` on every rank where one of a group has others.
    """
    rewards = stock(*args, **kwargs)
    each = rewards.nan_to_num(torch.inf).unflatten(0, (world_size() // copies, copies, -1))
    differing = ~torch.isclose(each, each[:, :1], rtol=1e-5, atol=1e-6).all(-1).all(-1)  # reward models may round
    if bool(differing.any()):
        ranks = differing.flatten().nonzero().flatten().tolist()
        raise on_every_rank(
            UspBatchError(
                f"rewards of {named(ranks)} that differ from those of the first rank of the same group",
                rule="ranks that share a batch train on the same rewards",
                remedy="wrap the reward function in hf_usp.once(...), which runs it on one rank of each group; or seed "
                "what is random in it equally",
            )
        )
    return rewards


def _score(modules: list[Any], score: Callable[..., Any], copies: int, *args: Any, **kwargs: Any) -> Any:
    """The trainer's method, for the length of which the deviation in its modules is ours."""
    patches = AttributePatches()
    for module in modules:
        patches.set(module, DEVIATION, partial(deviation, getattr(module, DEVIATION), copies))
    try:
        return score(*args, **kwargs)
    finally:
        patches.undo()


def _sliced(
    accelerator: Any, modules: list[Any], method: Callable[..., Any], copies: int, *args: Any, **kwargs: Any
) -> Any:
    """The trainer's method, for the length of which the accelerator's `process_index` is the number of the group.

    Gathered objects are then those of one rank of every group, as gathered tensors are.
    """
    patches = AttributePatches()
    patches.set(accelerator, "state", GroupIndexState(accelerator.state, copies))
    for module in modules:
        patches.set(module, GATHER, partial(_objects_once, copies))
    try:
        return method(*args, **kwargs)
    finally:
        patches.undo()


def _objects_once(copies: int, objects: list[Any]) -> list[Any]:
    """The objects of all groups of `copies` ranks that hold the same ones, once."""
    return [each for those_of_rank in gather_object([objects])[::copies] for each in those_of_rank]


def deviation(
    stock: Callable[..., Tensor], copies: int, rewards: Tensor, dim: Any = None, keepdim: bool = False
) -> Tensor:
    """The standard deviation of rewards of which everyone is there `copies` times, where it goes over all of them.

    Along a dim it is the stock one: that of the completions of one prompt, which are there once.
    """
    found = stock(rewards, dim=dim, keepdim=keepdim)
    if dim is not None:
        return found
    every = (~torch.isnan(rewards)).sum()
    once = every / copies
    return found * ((every - 1) / every * once / (once - 1)).sqrt()
