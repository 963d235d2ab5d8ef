"""Whatever feeds the stock Trainer, ranks of one mesh see the same rows, in the order of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

import hf_usp

from ..harness import fresh_accelerate, training_arguments
from ..ranks import Ranks
from ..tiny import largest_difference, padded, rows, tiny_model, uneven_rows

Mesh = tuple[int, int] | None
CP4, DP2 = (4, 2), (2, 2)  # cp_size and ulysses degree on four ranks; the second with data parallelism around it


class Stream(IterableDataset):
    """Rows without a length, the same in every process."""

    def __init__(self, items: list[dict[str, Any]]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from self.items


def streamed(shards: int) -> Callable[[int], Any]:
    def make(count: int) -> Any:
        import datasets

        whole = datasets.Dataset.from_list(uneven_rows(count))
        return whole.to_iterable_dataset(num_shards=shards).shuffle(seed=3, buffer_size=5)

    return make


def stream(count: int) -> Stream:
    return Stream(uneven_rows(count))


WORKERS = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2}
# name -> (dataset, arguments)
FEEDS: dict[str, tuple[Callable[[int], Any], dict[str, Any]]] = {
    "grouped by length": (uneven_rows, {"train_sampling_strategy": "group_by_length"}),
    "rebalanced": (uneven_rows, {"train_sampling_strategy": "batch_rebalance", "dataloader_drop_last": True}),
    "workers": (uneven_rows, WORKERS),
    "dropped last": (uneven_rows, {"dataloader_drop_last": True}),
    "split batches": (uneven_rows, {"accelerator_config": {"split_batches": True}}),
    "not seedable": (uneven_rows, {"accelerator_config": {"use_seedable_sampler": False}}),
    "iterable": (stream, {}),
    "iterable split": (stream, {"accelerator_config": {"split_batches": True}}),
    "iterable not dispatched": (stream, {"accelerator_config": {"dispatch_batches": False}}),
    "streaming dataset": (streamed(1), {}),
    "streaming shards": (streamed(2), {}),
    "dispatched": (stream, {"accelerator_config": {"dispatch_batches": True}}),
}
STEPS = 6  # more than an epoch


def train(folder: str, mesh: Mesh, feed: str, count: int) -> dict[str, Any]:
    import multiprocessing

    from transformers import Trainer

    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it has workers
    fresh_accelerate()
    dataset, arguments = FEEDS[feed]
    config = None if mesh is None else hf_usp.UspParallelismConfig(cp_size=mesh[0], ulysses_degree=mesh[1])
    model = tiny_model("llama", "sdpa" if config is None else "usp")
    seen: list[list[int]] = []
    model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"][:, 0].tolist()), with_kwargs=True)
    split = arguments.get("accelerator_config", {}).get("split_batches")
    args = training_arguments(
        folder,
        seed=5,
        parallelism_config=config,
        per_device_train_batch_size=2 if mesh is None or split else 2 * mesh[0] // 4,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        save_strategy="no",
        logging_steps=1,
        learning_rate=0.01,
        optim="sgd",
        remove_unused_columns=False,
        **arguments,
    )
    trainer = Trainer(model=model, args=args, train_dataset=dataset(count), data_collator=padded)
    trainer.train()
    return {
        "losses": [h["loss"] for h in trainer.state.log_history if "loss" in h],
        "counts": (trainer.state.global_step, trainer.state.epoch, trainer.state.max_steps),
        "seen": seen,
        "weights": {n: p.detach().clone() for n, p in model.state_dict().items()},
    }


def compare(ranks: Ranks, folder: Path, feed: str, mesh: Mesh, count: int) -> None:
    assert mesh is not None
    reference = train(str(folder), None, feed, count)
    results = ranks.run(train, str(folder), mesh, feed, count)
    for mine in results:
        assert mine["counts"] == reference["counts"]
        assert mine["losses"] == pytest.approx(reference["losses"], abs=1e-5)
        assert largest_difference(mine["weights"], reference["weights"]) < 1e-6
    parts = [result["seen"] for result in results[:: mesh[0]]]
    assert [sum(batch, []) for batch in zip(*parts, strict=True)] == reference["seen"]


@pytest.mark.parametrize("feed", [feed for feed in FEEDS if feed != "dispatched"])
def test_the_rows_of_one_process(four_ranks: Ranks, tmp_path: Path, feed: str) -> None:
    """13 rows: the last batch is not full, and the batches of an epoch do not fill its last step."""
    compare(four_ranks, tmp_path, feed, CP4, 13)


@pytest.mark.parametrize("feed", ["rebalanced", "split batches", "iterable", "iterable split"])
def test_with_data_parallelism_around(four_ranks: Ranks, tmp_path: Path, feed: str) -> None:
    """14 rows: Accelerate fills up a last batch that does not give every data-parallel rank a row."""
    compare(four_ranks, tmp_path, feed, DP2, 14)


def dispatched(folder: str) -> str:
    with pytest.raises(hf_usp.UspConfigError) as refusal:
        train(folder, CP4, "dispatched", 13)
    return str(refusal.value)


def test_batches_dealt_by_the_first_process_are_refused(four_ranks: Ranks, tmp_path: Path) -> None:
    for message in four_ranks.run(dispatched, str(tmp_path)):
        assert "dispatch_batches=True" in message and "leave dispatch_batches out" in message


def seeded_by_rank(manual_loop: str, differently: bool) -> tuple[list[list[int]], float]:
    """The first tokens of two epochs' batches of a loop by hand, and what this rank draws afterwards."""
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler
    from transformers import default_data_collator

    fresh_accelerate()
    sharded = torch.distributed.is_initialized()
    config = hf_usp.UspParallelismConfig(cp_size=2, ulysses_degree=2) if sharded else None
    accelerator, items = Accelerator(cpu=True, parallelism_config=config), rows(8, 24)
    set_seed(3, device_specific=differently)
    generator = None
    if manual_loop == "generator":
        generator = torch.Generator().manual_seed(5 + accelerator.process_index * differently)
    kinds: dict[str, Any] = {"subset": SubsetRandomSampler(range(8))}
    sampler = kinds.get(manual_loop) or RandomSampler(items, generator=generator)  # type: ignore[arg-type]
    loader = accelerator.prepare(
        DataLoader(items, batch_size=2, sampler=sampler, collate_fn=default_data_collator)  # type: ignore[arg-type]
    )
    seen = [batch["input_ids"][:, 0].tolist() for _ in range(2) for batch in loader]
    return seen, torch.rand(1).item()


@pytest.mark.parametrize("manual_loop", ["global", "generator", "subset"])
def test_one_order_for_ranks_that_are_seeded_differently(two_ranks: Ranks, manual_loop: str) -> None:
    """The order, and the first rank's random numbers, are those of one process; other ranks keep their own."""
    seen, drawn = seeded_by_rank(manual_loop, False)
    for differently in (False, True):
        first, second = two_ranks.run(seeded_by_rank, manual_loop, differently)
        assert first == (seen, drawn)
        assert second[0] == seen
        assert (second[1] != drawn) == differently
