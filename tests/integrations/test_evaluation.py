"""The Trainer's ways of evaluating and of choosing a model: metrics, stops and choices of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hf_usp

from ..harness import fresh_accelerate, training_arguments
from ..ranks import Ranks
from ..tiny import largest_difference, padded, rows, tiny_model, uneven_rows

Mesh = tuple[int, int] | None
# How `Trainer.evaluate` may hand on what it gathered.
WAYS: dict[str, dict[str, Any]] = {
    "whole": {"include_for_metrics": ["inputs", "loss"]},
    "moved in parts": {"include_for_metrics": ["inputs", "loss"], "eval_accumulation_steps": 2},
    "lists of batches": {"eval_do_concat_batches": False},
    "batch by batch": {"batch_eval_metrics": True, "include_for_metrics": ["loss"]},
}


def trainer_for(model: Any, folder: str, mesh: Mesh, gather: bool = True, **settings: Any) -> Any:
    """A stock Trainer on four ranks, or in one process; rows of 24 to 40 tokens, the last batches not full."""
    from transformers import Trainer

    fresh_accelerate()
    config = None
    if mesh is not None:
        config = hf_usp.UspParallelismConfig(cp_size=mesh[0], ulysses_degree=mesh[1], gather_outputs=gather)
    names = ("compute_metrics", "preprocess_logits_for_metrics", "callbacks")
    others = {name: settings.pop(name) for name in names if name in settings}
    args = training_arguments(
        folder,
        parallelism_config=config,
        per_device_train_batch_size=2 if mesh is None else 2 * mesh[0] // 4,
        per_device_eval_batch_size=2 if mesh is None else 2 * mesh[0] // 4,
        logging_steps=1,
        learning_rate=0.5,
        optim="sgd",
        lr_scheduler_type="constant",
        **settings,
    )
    made = uneven_rows(20)
    return Trainer(
        model=model, args=args, train_dataset=made[:12], eval_dataset=made[13:], data_collator=padded, **others
    )


class Metrics:
    """Token accuracy; with inputs and losses where they are included. Keeps sums, for `batch_eval_metrics`."""

    def __init__(self) -> None:
        self.right = self.tokens = self.ids = 0
        self.losses: list[float] = []

    def __call__(self, prediction: Any, compute_result: bool = True) -> dict[str, float]:
        batches = (prediction.predictions, prediction.label_ids)
        for ids, labels in zip(*(x if isinstance(x, list) else [x] for x in batches), strict=True):
            ids, labels = np.asarray(ids)[:, :-1], np.asarray(labels)[:, 1:]
            counted = labels != -100
            self.right, self.tokens = self.right + int((ids == labels)[counted].sum()), self.tokens + counted.sum()
        if prediction.inputs is not None:
            self.ids += int(np.asarray(prediction.inputs).clip(0).sum())
        if prediction.losses is not None:
            self.losses += np.asarray(prediction.losses).tolist()
        if not compute_result:
            return {}
        result = {"accuracy": self.right / self.tokens, "tokens": float(self.tokens), "ids": float(self.ids)}
        result |= {f"loss_{i}": loss for i, loss in enumerate(self.losses)}
        self.__init__()  # type: ignore[misc]
        return result


def most_likely(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    assert logits.shape[:2] == labels.shape
    return logits.argmax(-1)


def kept(metrics: dict[str, float]) -> dict[str, float]:
    """Without clocks, and without operations, of which the Trainer counts those of the full batch for every rank."""
    return {name: x for name, x in metrics.items() if not any(s in name for s in ("time", "per_second", "flos"))}


def evaluate(folder: str, mesh: Mesh) -> dict[str, Any]:
    """Every way on one model, prepared anew each time; and a loss alone, without logits."""
    model, found = tiny_model("qwen2", "sdpa" if mesh is None else "usp"), {}
    for way, settings in WAYS.items():
        trainer = trainer_for(
            model, folder, mesh, compute_metrics=Metrics(), preprocess_logits_for_metrics=most_likely, **settings
        )
        found[way] = kept(trainer.evaluate())
        if way != "batch by batch":
            found[f"predict, {way}"] = kept(trainer.predict(uneven_rows(8)).metrics)
    trainer = trainer_for(model, folder, mesh, gather=False, compute_metrics=Metrics(), prediction_loss_only=True)
    found["loss only"] = kept(trainer.evaluate())
    return found


@pytest.mark.parametrize("mesh", [(4, 2), (2, 2)], ids=str)
def test_metrics_of_one_process(four_ranks: Ranks, tmp_path: Path, mesh: Any) -> None:
    """Seven rows, whose last batch data-parallel ranks fill up with the first; eight to predict."""
    reference = evaluate(str(tmp_path), None)
    assert reference["whole"]["eval_ids"] > 0
    assert {"eval_loss", "eval_accuracy", "eval_loss_6"} <= reference["batch by batch"].keys()
    for mine in four_ranks.run(evaluate, str(tmp_path), mesh):
        assert mine.keys() == reference.keys()
        for way, metrics in reference.items():
            # Data-parallel ranks have losses whose mean is the loss of a batch.
            left_out = "#" if mesh[0] == 4 else "_loss_" if "predict" in way else "_loss"
            names = [name for name in metrics if left_out not in name]
            assert [mine[way][n] for n in names] == pytest.approx([metrics[n] for n in names], abs=1e-5), way
            assert mine[way].keys() == metrics.keys()


def choose(folder: str, mesh: Mesh) -> dict[str, Any]:
    """Train until an evaluation after every step stops getting better; go back to the best."""
    from transformers import EarlyStoppingCallback

    model = tiny_model("qwen2", "sdpa" if mesh is None else "usp")
    trainer = trainer_for(
        model,
        folder,
        mesh,
        compute_metrics=Metrics(),
        preprocess_logits_for_metrics=most_likely,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        max_steps=20,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        save_only_model=True,
    )
    trainer.train()
    state = trainer.state
    return {
        "stopped": (state.global_step, state.best_global_step, state.best_metric, state.best_model_checkpoint),
        "logs": [kept(entry) for entry in state.log_history],
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "saved": sorted(path.name for path in Path(state.best_model_checkpoint).iterdir()),
    }


def test_the_same_best_model_and_the_same_stop(four_ranks: Ranks, tmp_path: Path) -> None:
    reference = choose(str(tmp_path), None)
    assert 1 < reference["stopped"][1] < reference["stopped"][0] < 20
    for mine in four_ranks.run(choose, str(tmp_path), (4, 2)):
        assert mine["stopped"][2] == pytest.approx(reference["stopped"][2], abs=1e-5)
        assert [*mine["stopped"][:2], mine["stopped"][3]] == [*reference["stopped"][:2], reference["stopped"][3]]
        assert mine["saved"] == reference["saved"]
        for here, there in zip(mine["logs"], reference["logs"], strict=True):
            assert here == pytest.approx(there, abs=1e-4)
        assert largest_difference(mine["weights"], reference["weights"]) < 1e-5


def loop(mesh: Mesh) -> dict[str, Any]:
    """A loop by hand that accumulates two batches a step and gathers tensors, nested ones and objects."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    fresh_accelerate()
    config = None if mesh is None else hf_usp.UspParallelismConfig(cp_size=mesh[0], ulysses_degree=mesh[1])
    accelerator = Accelerator(cpu=True, parallelism_config=config, gradient_accumulation_steps=2)
    data: Any = rows(7, 29, ignored=False)
    loader: DataLoader[Any] = DataLoader(data, batch_size=2 if mesh is None else 2 * mesh[0] // 4, collate_fn=padded)
    model = tiny_model("qwen2", "sdpa" if mesh is None else "usp")
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    gathered: list[Any] = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        first = batch["input_ids"][:, 0]
        tensors = accelerator.gather_for_metrics({"first": first, "more": (batch["labels"], [first + 1])})
        words = accelerator.gather_for_metrics([f"row of {i}" for i in first.tolist()])
        uneven = accelerator.gather_for_metrics([torch.arange(i) for i in first.tolist()], use_gather_object=True)
        gathered.append((tensors, words, uneven))
    weights = {name: p.detach().clone() for name, p in accelerator.unwrap_model(model).named_parameters()}
    return {"gathered": gathered, "loss": accelerator.gather_for_metrics(loss.repeat(2)).mean(), "weights": weights}


@pytest.mark.parametrize("mesh", [(4, 2), (2, 2)], ids=str)
def test_a_loop_by_hand_accumulates_and_gathers_every_row_once(four_ranks: Ranks, mesh: Any) -> None:
    reference = loop(None)
    for mine in four_ranks.run(loop, mesh):
        for here, there in zip(mine["gathered"], reference["gathered"], strict=True):
            torch.testing.assert_close(here[0], there[0], rtol=0, atol=0)
            assert here[1] == there[1]
            assert [x.tolist() for x in here[2]] == [x.tolist() for x in there[2]]
        if mesh[0] == 4:  # data-parallel ranks fill up the last batch, which trains
            assert mine["loss"].item() == pytest.approx(reference["loss"].item(), abs=1e-5)
            assert largest_difference(mine["weights"], reference["weights"]) < 1e-6


SHARES = ("logits", "hidden states", "adapter in bf16", "by hand")


def gathers_shares(folder: str, case: str) -> str:
    """The message of the refusal when shares of logits or hidden states would be gathered."""
    model, settings = tiny_model(), {}
    if case == "hidden states":
        model.config.output_hidden_states = True
    if case == "adapter in bf16":  # what Accelerate casts lies around our hooks
        from peft import LoraConfig, get_peft_model

        model, settings = (
            get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")),
            {"bf16": True},
        )
    trainer = trainer_for(model, folder, (4, 2), gather=False, **settings)
    with pytest.raises(hf_usp.UspModelError) as refusal:
        if case == "by hand":
            wrapped = trainer.accelerator.prepare(model)
            trainer.accelerator.gather_for_metrics([{"logits": wrapped(**padded(uneven_rows(2))).logits.float()}])
        else:
            trainer.predict(uneven_rows(2))
    return str(refusal.value)


@pytest.mark.parametrize("case", SHARES)
def test_shares_are_not_gathered(four_ranks: Ranks, tmp_path: Path, case: str) -> None:
    for message in four_ranks.run(gathers_shares, str(tmp_path), case):
        assert "hold shares" in message and "gather_outputs=True" in message
