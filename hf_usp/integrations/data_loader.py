"""Data loaders whose batches are the same on all ranks that share a sequence.

Accelerate already reads the mesh: ranks along "cp" and "tp" get the same part of a dataset. Three ways to feed a model
do not look at the mesh, and are told here, before the loader is prepared:

- Loaders of iterable datasets are by default read by the first process, which deals their rows to all ranks. Here every
  rank reads for itself, as it does with any other dataset (streaming.py).
- `train_sampling_strategy="batch_rebalance"` deals rows to ranks on its own, by the number of processes.
- Workers of the Trainer's loaders are seeded by rank: random collators would differ between ranks of a group.

Accelerate sends the first rank's random state to all ranks that read different rows of a shuffled dataset, and to none
where all ranks share their rows; here that is done at the beginning of every epoch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import broadcast_object_list
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from ..compat import is_batch_rebalance_sampler
from ..distributed.agreement import verify_same_on_all_processes
from ..errors import UspConfigError
from ..utils.patches import AttributePatches
from .streaming import count_rows, number_batches


def same_rows(
    accelerator: Accelerator, loader: DataLoader, model_parallel_size: int, patches: AttributePatches
) -> None:
    """Make the loader, not yet prepared, give `model_parallel_size` consecutive ranks the same rows.

    Raises:
        UspConfigError: dispatch_batches=True, or an iterable dataset whose rows only some ranks have.
    """
    if isinstance(loader.dataset, IterableDataset):  # asynchronous trainers have their rows on the first rank alone
        verify_same_on_all_processes({"kind of iterable dataset": type(loader.dataset).__name__})
    if accelerator.dispatch_batches:
        raise UspConfigError(
            "dispatch_batches=True under UspParallelismConfig",
            rule="the ranks of a context-parallel group get the same full batch; a dispatcher deals other rows to each",
            remedy="leave dispatch_batches out, and every rank reads its rows itself (seed what is random in the "
            "dataset equally on all ranks)",
        )
    if accelerator.dispatch_batches is None:
        config = copy.copy(accelerator.dataloader_config)
        config.dispatch_batches = False
        patches.set(accelerator, "dataloader_config", config)
    count_rows(loader, patches)
    from transformers.trainer_utils import seed_worker  # with the Trainer's own imports, too many for `import hf_usp`

    sampler = loader.batch_sampler
    if is_batch_rebalance_sampler(sampler):
        patches.replace_all(sampler, partial(_assign_to_groups, sampler, model_parallel_size))
    seed = loader.worker_init_fn
    if isinstance(seed, partial) and seed.func is seed_worker:
        patches.set(loader, "worker_init_fn", partial(seed, rank=seed.keywords["rank"] // model_parallel_size))


def same_order(loader: Any, ranks: int, model_parallel_size: int, patches: AttributePatches) -> None:
    """Make a prepared loader, whose rows all `ranks` share, draw one order of them however ranks are seeded.

    The order is that which the first rank draws, so that of one process. Seedable samplers bring their own seed.
    """
    number_batches(loader)
    if ranks != model_parallel_size:
        return  # Accelerate sees to that
    generator = getattr(loader.dataset, "generator", None)
    if isinstance(loader.dataset, IterableDataset) and isinstance(generator, torch.Generator):
        patches.set(loader, "rng_types", [*(loader.rng_types or ()), "generator"])
        patches.set(loader, "synchronized_generator", generator)
    batches = loader.sampler if isinstance(loader.sampler, BatchSampler) else loader.batch_sampler
    sampler = getattr(batches, "sampler", None)
    if hasattr(sampler, "generator") and not isinstance(sampler, SeedableRandomSampler):
        patches.set(batches, "sampler", _OneOrder(sampler))


class _OneOrder(Sampler):
    """The order of a sampler that draws at random, as the first rank draws it."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["sampler"], name)  # set_epoch, for one

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        given = self.sampler.generator
        generator = torch.default_generator if given is None else given
        own = generator.get_state()
        first = broadcast_object_list([own])[0]
        if torch.equal(own, first):
            return iter(self.sampler)
        generator.set_state(first)
        order = list(self.sampler)
        if given is None:
            generator.set_state(own)  # what else this rank draws stays its own
        return iter(order)


def _assign_to_groups(sampler: Any, model_parallel_size: int) -> None:
    """Set up a `BatchRebalanceSampler` anew (the Trainer keeps the object), with groups of ranks for ranks."""
    sampler.__init__(
        lengths=sampler.lengths,
        effective_batch_size=sampler.effective_batch_size // model_parallel_size,
        dp_size=sampler.dp_size // model_parallel_size,
        grad_accum=sampler.grad_accum,
        shuffle=sampler.shuffle,
        seed=sampler.seed,
        rank=sampler.rank // model_parallel_size,
        drop_last=sampler.drop_last,
    )
