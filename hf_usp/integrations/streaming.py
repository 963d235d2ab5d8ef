"""Iterable datasets: every rank reads them itself and knows which rows only pad its last step.

Accelerate's default for iterable datasets, the first process reading for all, would know as well; decision 4 says why
it is not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader, IterableDataset, get_worker_info


class CountedRows(IterableDataset):
    """An iterable dataset that counts the rows of its last pass, also where a worker process reads it."""

    def __init__(self, dataset: IterableDataset, workers: int) -> None:
        self.dataset = dataset
        self.counts = torch.zeros(max(1, workers), dtype=torch.int64).share_memory_()

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        count = self.counts[0 if worker is None else worker.id]
        count.zero_()
        for row in self.dataset:
            count += 1
            yield row

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not there yet, while an object is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)


def count_rows(loader: DataLoader) -> None:
    """Make a loader that is not yet prepared count the rows of its stream."""
    if isinstance(loader.dataset, IterableDataset) and not isinstance(loader.dataset, CountedRows):
        # A DataLoader refuses the plain assignment, since its sampler might be that of another dataset.
        vars(loader)["dataset"] = CountedRows(loader.dataset, loader.num_workers)


def rows_of_last_step(state: Any) -> int | None:
    """Rows that are no repetition in the step that ended the loader in use, over all ranks; None: all, or unknown.

    state: the accelerator's `gradient_state`.
    """
    if not state.end_of_dataloader:
        return None
    loader = state.active_dataloader
    shard = loader.dataset
    stream = shard.dataset if isinstance(shard, IterableDatasetShard) else shard
    if not isinstance(stream, CountedRows):
        return state.remainder if state.remainder > 0 else None
    if loader.batch_size is None or loader.drop_last or len(stream.counts) > 1:
        return None
    step = loader.batch_size
    if shard is not stream:
        step = shard.batch_size * (1 if shard.split_batches else shard.num_processes)
    return int(stream.counts) % step or None
