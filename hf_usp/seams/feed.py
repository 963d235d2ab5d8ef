"""Data loaders whose batches are the same on all ranks that share a sequence.

Accelerate already reads the mesh: ranks along "cp" and "tp" get the same part of a dataset. Three ways to feed a model
do not look at the mesh, and are told here, before the loader is prepared:

- Loaders of iterable datasets are by default read by the first process, which deals their rows to all ranks. Here every
  rank reads for itself, as it does with any other dataset (streams.py).
- `train_sampling_strategy="batch_rebalance"` deals rows to ranks on its own, by the number of processes.
- Workers of the Trainer's loaders are seeded by rank: random collators would differ between ranks of a group.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from accelerate import Accelerator
from torch.utils.data import DataLoader

from ..errors import UspConfigError
from .streams import count_rows


def same_rows(accelerator: Accelerator, loader: DataLoader, copies: int) -> None:
    """Make the loader, not yet prepared, give `copies` consecutive ranks the same rows.

    Raises:
        UspConfigError: dispatch_batches=True.
    """
    if accelerator.dispatch_batches:
        raise UspConfigError(
            "dispatch_batches=True under UspParallelismConfig",
            rule="the ranks of a context-parallel group get the same full batch; a dispatcher deals other rows to each",
            remedy="leave dispatch_batches out, and every rank reads its rows itself (seed what is random in the "
            "dataset equally on all ranks)",
        )
    if accelerator.dispatch_batches is None:
        accelerator.dataloader_config = copy.copy(accelerator.dataloader_config)
        accelerator.dataloader_config.dispatch_batches = False
    count_rows(loader)
    from transformers import trainer_pt_utils  # with the Trainer's own imports, too many for `import hf_usp`
    from transformers.trainer_utils import seed_worker

    sampler = loader.batch_sampler
    # Transformers 5.17 has no such sampler.
    if isinstance(sampler, getattr(trainer_pt_utils, "BatchRebalanceSampler", ())):
        _deal_to_groups(sampler, copies)
    seed = loader.worker_init_fn
    if isinstance(seed, partial) and seed.func is seed_worker:
        loader.worker_init_fn = partial(seed, rank=seed.keywords["rank"] // copies)


def _deal_to_groups(sampler: Any, copies: int) -> None:
    """Set up a `BatchRebalanceSampler` anew (the Trainer keeps the object), with groups of ranks for ranks."""
    sampler.__init__(
        lengths=sampler.lengths, effective_batch_size=sampler.effective_batch_size // copies,
        dp_size=sampler.dp_size // copies, grad_accum=sampler.grad_accum, shuffle=sampler.shuffle, seed=sampler.seed,
        rank=sampler.rank // copies, drop_last=sampler.drop_last,
    )  # fmt: skip
