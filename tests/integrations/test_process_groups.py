"""Whoever counts with a prepared accelerator counts ranks that share a batch once: Accelerate's loops, the Trainers."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import hf_usp

from ..harness import fresh_accelerate
from ..ranks import Ranks
from ..tiny import rows, tiny_model

CP = 2  # over two or four ranks


def config_for(processes: int, **options: Any) -> Any:

    fresh_accelerate()
    return hf_usp.UspParallelismConfig(cp_size=CP, **options) if processes > 1 else None


def own_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum of the token losses."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


COUNTS = ("gathered", "gathered for metrics", "reduced", "of a loss outside the model")


def loop(processes: int) -> dict[str, Any]:
    """Loops as Accelerate's guides have them, over the rows of a step: losses and norms by how tokens are counted, and
    the rates of prepared schedules by how long their script makes them."""
    from accelerate import Accelerator
    from transformers import default_data_collator, get_linear_schedule_with_warmup

    accelerator = Accelerator(cpu=True, parallelism_config=config_for(processes, gather_outputs=True))
    model = tiny_model("qwen2", "usp" if processes > 1 else "sdpa")
    groups = accelerator.num_processes
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(rows(8, 20), batch_size=4 // groups, collate_fn=default_data_collator)
    schedules = [
        get_linear_schedule_with_warmup(optimizer, len(loader), len(loader) * 3),
        get_linear_schedule_with_warmup(optimizer, 2 * groups, 6 * groups),
    ]
    model, optimizer, loader, *schedules = accelerator.prepare(model, optimizer, loader, *schedules)
    result: dict[str, Any] = {"processes": groups}
    batch = next(iter(loader))
    mine = (batch["labels"][:, 1:] != -100).sum()
    for way in COUNTS:
        if way == "reduced":
            items = accelerator.reduce(mine, "sum")
        else:
            items = (accelerator.gather_for_metrics if "metrics" in way else accelerator.gather)(mine).sum()
        if "outside" in way:
            loss = own_loss(model(input_ids=batch["input_ids"]).logits, batch["labels"]) / items
        else:
            loss = model(**batch, num_items_in_batch=items).loss
        accelerator.backward(loss * accelerator.num_processes)
        norm = accelerator.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.optimizer.zero_grad()
        parts = accelerator.gather(loss.detach() * accelerator.num_processes)
        result[way] = (items.item(), parts.mean().item(), norm.item())
    rates: list[list[float]] = [[], []]
    for schedule, seen in zip(schedules, rates, strict=True):
        for _ in range(6):
            seen.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
    result["mean"] = accelerator.reduce(torch.tensor(3.0), "mean").item()
    result["rates"], result["rows"] = rates, accelerator.gather(batch["input_ids"]).tolist()
    return result


def test_loops_of_accelerates_guides(two_ranks: Ranks, four_ranks: Ranks) -> None:
    reference = loop(1)
    assert reference["rates"][0] == pytest.approx([0, 0.05, 0.1, 0.075, 0.05, 0.025])
    for ranks in (two_ranks, four_ranks):
        for mine in ranks.run(loop, ranks.size):
            assert mine["processes"] == ranks.size // CP
            for way in COUNTS:
                assert mine[way] == pytest.approx(reference[way], rel=1e-5), way
            assert mine["rates"][1] == pytest.approx(reference["rates"][1])  # of a script that multiplies by processes
            assert mine["rates"][0] == pytest.approx(reference["rates"][0])
            assert mine["rows"] == reference["rows"] and mine["mean"] == 3.0


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        yield from rows(7, 20)


def trainers(folder: str, processes: int) -> dict[str, Any]:
    """A loss of one's own in the Trainer, evaluations of a list and of a stream, a prediction of `Seq2SeqTrainer`."""
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):  # type: ignore[no-untyped-def]
            outputs = model(**inputs)
            loss = own_loss(outputs.logits, inputs["labels"])
            if num_items_in_batch is None:
                loss = loss / (inputs["labels"][:, 1:] != -100).sum()
            else:
                loss = loss / num_items_in_batch * self.accelerator.num_processes
            return (loss, outputs) if return_outputs else loss

    def metrics(prediction: Any) -> dict[str, int]:
        labels = np.asarray(prediction.label_ids)
        return {"rows": len(labels), "labels": int((labels != -100).sum())}

    batch = 4 // max(1, processes // CP)
    settings: dict[str, Any] = {
        "output_dir": folder,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "max_steps": 2,
        "save_strategy": "no",
        "logging_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": batch,
    }
    attention, result = "usp" if processes > 1 else "sdpa", {}
    args = TrainingArguments(parallelism_config=config_for(processes, gather_outputs=True), **settings)
    trainer = Own(model=tiny_model("qwen2", attention), args=args, train_dataset=rows(8, 20), compute_metrics=metrics)
    result["batch"] = trainer.get_total_train_batch_size(args)
    trainer.train()
    logs = trainer.state.log_history
    result["training"] = [h[name] for h in logs for name in ("loss", "grad_norm") if name in h]
    for name, dataset in (("list", rows(7, 20)), ("stream", Stream())):
        found = trainer.evaluate(dataset)
        result[name] = [found[f"eval_{key}"] for key in ("loss", "rows", "labels")]
    args = Seq2SeqTrainingArguments(parallelism_config=config_for(processes, gather_outputs=True), **settings)
    trainer = Seq2SeqTrainer(model=tiny_model("qwen2", attention), args=args)
    found = trainer.predict(rows(8, 20))
    result["predicted"] = torch.as_tensor(found.predictions)
    result["labels"] = found.label_ids.tolist()
    return result


def test_trainers(two_ranks: Ranks, four_ranks: Ranks, tmp_path: Path) -> None:
    reference = trainers(str(tmp_path), 1)
    assert reference["batch"] == 4 and reference["stream"][1] == 7
    for ranks in (two_ranks, four_ranks):
        for mine in ranks.run(trainers, str(tmp_path), ranks.size):
            assert mine["labels"] == reference["labels"]
            assert mine["batch"] == CP * reference["batch"]  # the Trainer's log alone: docs/troubleshooting.md
            assert mine["training"] == pytest.approx(reference["training"], rel=1e-4)
            # Data-parallel ranks have batches of two and an odd number of rows: a loss for each batch, not each row.
            counts = slice(None) if ranks.size == CP else slice(1, None)
            assert mine["list"][counts] == pytest.approx(reference["list"][counts], rel=1e-5)
            assert mine["stream"] == pytest.approx(mine["list"], rel=1e-5)
            torch.testing.assert_close(mine["predicted"], reference["predicted"], atol=1e-5, rtol=1e-5)


def test_numbers_and_rows_under_tensor_parallelism() -> None:
    """Two data-parallel ranks x cp 2 x tp 2: rows once, numbers tp_size times, as TRL's `num_tokens` expects."""
    from accelerate import Accelerator

    from hf_usp.integrations.gathering import Gathering

    def stock(tensor: torch.Tensor) -> torch.Tensor:
        """All eight ranks; the last four have the rows of another data-parallel rank."""
        return torch.cat([torch.atleast_1d(tensor)] * 4 + [torch.atleast_1d(tensor) + 10] * 4)

    gathering = Gathering(Accelerator(cpu=True), 2, 2, stock, lambda tensor, *_: tensor * 8)
    assert gathering.gather(torch.tensor(5)).tolist() == [5, 5, 15, 15]
    assert gathering.gather_for_metrics(torch.tensor(5)).sum().item() // 2 == 5 + 15
    assert gathering.gather({"rows": torch.tensor([1, 2])})["rows"].tolist() == [1, 2, 11, 12]
    assert gathering.reduce(torch.tensor(3)).item() == 12 and gathering.reduce(torch.tensor(3.0)).item() == 12.0


def test_deepspeeds_schedule_has_the_steps_of_groups() -> None:
    """Accelerate divides its number of steps by the number of all processes."""
    from accelerate.utils import DummyScheduler

    from hf_usp.integrations.process_groups import count_for_groups

    given = DummyScheduler(torch.optim.SGD([torch.zeros(1)]), total_num_steps=30)
    assert count_for_groups(given, 2).total_num_steps == 60 and given.total_num_steps == 30


class Parts(IterableDataset):
    """Rows of a number each, of which every worker reads its part."""

    def __init__(self, parts: list[int]) -> None:
        self.parts = parts

    def __iter__(self) -> Any:
        worker = get_worker_info()
        assert worker is not None
        first = sum(self.parts[: worker.id])
        yield from range(first, first + self.parts[worker.id])


def read_by_workers(parts: list[int], split_batches: bool) -> list[list[int]]:
    """Rows gathered in two epochs, then what is said of a loader that skips batches."""
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.data_loader import skip_first_batches

    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it has workers
    settings = DataLoaderConfiguration(split_batches=split_batches)
    accelerator = Accelerator(cpu=True, parallelism_config=config_for(4), dataloader_config=settings)
    loader = DataLoader(Parts(parts), batch_size=4 if split_batches else 2, num_workers=len(parts))
    loader = accelerator.prepare(loader)
    found = [[int(x) for batch in loader for x in accelerator.gather_for_metrics(batch)] for _ in range(2)]
    try:
        for batch in skip_first_batches(loader, 1):
            accelerator.gather_for_metrics(batch)
    except hf_usp.UspConfigError as refusal:
        assert "num_workers=1" in str(refusal)
        found.append([])
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("parts", [[5, 6], [8, 4], [1, 13]])
def test_rows_of_a_stream_that_several_workers_read_come_once(four_ranks: Ranks, parts: list[int]) -> None:
    for mine in four_ranks.run(read_by_workers, parts, parts == [1, 13], timeout=280):  # workers end slowly
        assert [sorted(rows) for rows in mine[:2]] == [list(range(sum(parts)))] * 2
        assert len(mine) == (2 if parts == [8, 4] else 3)  # nothing is filled up
