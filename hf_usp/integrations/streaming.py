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

from ..errors import UspConfigError
from ..utils.patches import AttributePatches


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


def count_rows(loader: DataLoader, patches: AttributePatches) -> None:
    """Make a loader that is not yet prepared count the rows of its stream."""
    if isinstance(loader.dataset, IterableDataset) and not isinstance(loader.dataset, CountedRows):
        # A DataLoader refuses the plain assignment, since its sampler might be that of another dataset.
        patches.set(loader, "dataset", CountedRows(loader.dataset, loader.num_workers))


class NumberedLoader(DataLoader):
    """A loader that knows how many batches of its last pass it has handed out."""

    fetched = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.fetched = 0
        for batch in super().__iter__():
            self.fetched += 1
            yield batch


def number_batches(prepared: Any) -> None:
    """Let a prepared loader know which batch is in use, where several workers read a stream."""
    base = getattr(prepared, "base_dataloader", None)
    if type(base) is DataLoader and isinstance(base.dataset, IterableDataset) and base.num_workers > 1:
        base.__class__ = NumberedLoader


def rows_of_step(state: Any) -> int | None:
    """Rows that are no repetition in the step in use of the loader in use, over all ranks; None: all, or unknown.

    Accelerate repeats rows in the last step of a dataset; of a stream in the last step of each worker that reads it.
    state: the accelerator's `gradient_state`.
    """
    loader = state.active_dataloader
    if loader is None:
        return None
    shard = loader.dataset
    stream = shard.dataset if isinstance(shard, IterableDatasetShard) else shard
    if not isinstance(stream, CountedRows):
        return state.remainder if state.end_of_dataloader and state.remainder > 0 else None
    if loader.batch_size is None or loader.drop_last:
        return None
    if len(stream.counts) > 1:
        return None if shard is stream else _rows_of_a_worker(stream.counts.tolist(), _step(shard), loader)
    step = loader.batch_size if shard is stream else _step(shard)
    return int(stream.counts) % step or None if state.end_of_dataloader else None


def _step(shard: IterableDatasetShard) -> int:
    """Rows that all ranks take in a step."""
    return shard.batch_size * (1 if shard.split_batches else shard.num_processes)


def _rows_of_a_worker(counts: list[int], step: int, loader: Any) -> int | None:
    """The rows of a step that one of several workers has read. Workers take turns until they have no more rows."""
    base = loader.base_dataloader
    if not isinstance(base, NumberedLoader):
        if loader.end_of_dataloader and any(count % step for count in counts):
            raise UspConfigError(
                f"rows to be gathered of a stream that {len(counts)} workers read",
                rule="each worker fills up its last step with rows of its first, which are no rows of the dataset; "
                "which steps these are is not known of a loader that skips batches or keeps a state",
                remedy="read the stream with num_workers=1 or num_workers=0 (dataloader_num_workers of the Trainer)",
            )
        return None
    # One batch is fetched ahead. A worker has read all rows of a step that it has handed out, or has no more.
    left = base.fetched - (not loader.end_of_dataloader)
    for start in range(0, max(counts), step):
        for count in counts:
            left -= count > start
            if left == 0:
                return count - start if count - start < step else None
    return None
