"""The stock Trainer over a mesh follows one process: weights, losses, counts, evaluation and prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hf_usp

from ..harness import compare, fresh_accelerate, one_process, run_trainer, training_arguments
from ..ranks import Ranks
from ..tiny import HYBRID, INDEXED, largest_difference, rows, tiny_model

# (cp_size, ulysses_degree, order); the rest of the four ranks is data parallel.
MESHES = [
    (4, 1, "zigzag"),
    (4, 1, "contiguous"),
    (4, 2, "zigzag"),
    (4, 2, "contiguous"),
    (4, 4, "contiguous"),
    (2, 1, "balanced"),
    (2, 2, "auto"),
    (1, None, "auto"),
]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_ten_sgd_steps_end_in_the_same_weights(four_ranks: Ranks, tmp_path: Path, mesh: Any) -> None:
    """Order, degrees and data-parallel size do not show; with windows, and a length that no mesh divides."""
    setup = {
        "rows": 48,
        "batch": 4,
        "accumulation": 2,
        "steps": 10,
        "evaluate": True,
        "family": "mistral",
        "length": 33,
    }
    reference = one_process(setup)
    assert len(reference["losses"]) == 10
    for mine in four_ranks.run(run_trainer, str(tmp_path), mesh, setup):
        compare(mine, reference)
        assert mine["norms"] == pytest.approx(reference["norms"], rel=1e-4)
        if mesh[0] == 4:
            assert mine["evaluation"] == pytest.approx(reference["evaluation"], abs=1e-5)


def test_fifty_adamw_steps_follow_the_same_losses(four_ranks: Ranks, tmp_path: Path) -> None:
    setup = {"rows": 10, "batch": 2, "steps": 50, "optim": "adamw_torch", "lr": 0.003, "clip": 1.0}
    reference = one_process(setup)
    assert reference["losses"][-1] < reference["losses"][0] - 0.05
    for mine in four_ranks.run(run_trainer, str(tmp_path), (4, 2, "auto"), setup):
        assert mine["losses"] == pytest.approx(reference["losses"], abs=1e-4)
        assert mine["counts"] == reference["counts"]


def test_a_model_with_recurrent_layers(four_ranks: Ranks, tmp_path: Path) -> None:
    setup = {"rows": 12, "batch": 2, "steps": 4, "family": "qwen3_5_text", "changes": HYBRID}
    reference = one_process(setup)
    for mine in four_ranks.run(run_trainer, str(tmp_path), (4, 2, "zigzag"), setup):
        compare(mine, reference)


@pytest.mark.parametrize("family", INDEXED)
def test_queries_that_select_their_keys(four_ranks: Ranks, tmp_path: Path, family: str) -> None:
    setup = {"rows": 12, "batch": 2, "steps": 4, "family": family, "changes": INDEXED[family]}
    reference = one_process(setup)
    assert reference["losses"][-1] != reference["losses"][0]
    for mine in four_ranks.run(run_trainer, str(tmp_path), (4, 2, "zigzag"), setup):
        compare(mine, reference)


@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant"])
def test_gradient_checkpointing_changes_nothing(four_ranks: Ranks, tmp_path: Path, kind: str) -> None:
    setup = {"rows": 12, "batch": 2, "steps": 4, "family": "qwen2"}
    reference = one_process(setup)
    for mine in four_ranks.run(run_trainer, str(tmp_path), (4, 2, "zigzag"), {**setup, "checkpointing": kind}):
        compare(mine, reference)


@pytest.mark.parametrize("mesh", [(4, 2, "auto"), (2, 2, "auto")], ids=str)
def test_predict_returns_whole_logits_of_every_row_once(four_ranks: Ranks, tmp_path: Path, mesh: Any) -> None:
    # Seven rows in batches of two: the last batch is not full.
    setup = {"rows": 4, "batch": 2, "steps": 1, "gather": True, "evaluate": True}
    reference = one_process(setup)
    assert reference["predicted"].shape == (7, 40, 64)
    for mine in four_ranks.run(run_trainer, str(tmp_path), mesh, setup):
        assert mine["predicted"].shape == reference["predicted"].shape
        torch.testing.assert_close(mine["predicted"], reference["predicted"], atol=2e-5, rtol=1e-4)
        assert torch.equal(mine["labels"], reference["labels"])
        if mesh[0] == 4:
            assert mine["test_loss"] == pytest.approx(reference["test_loss"], abs=1e-5)
            assert mine["evaluation"] == pytest.approx(reference["evaluation"], abs=1e-5)


def predict_with_shares(folder: str) -> str:
    """The message of the refusal when `predict` would gather shares of logits."""

    setup = {"rows": 2, "batch": 1, "steps": 1, "gather": False}
    from transformers import Trainer

    fresh_accelerate()
    args = training_arguments(
        folder,
        parallelism_config=hf_usp.UspParallelismConfig(cp_size=4, ulysses_degree=2),
    )
    trainer = Trainer(model=tiny_model(), args=args, eval_dataset=rows(setup["rows"], 40))
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(hf_usp.UspModelError) as refusal:
        trainer.predict(rows(2, 40))
    return str(refusal.value)


def test_predict_without_gathered_outputs_is_refused(four_ranks: Ranks, tmp_path: Path) -> None:
    for message in four_ranks.run(predict_with_shares, str(tmp_path)):
        assert "gather_outputs=True" in message


def mean_square(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """A loss that is no sum over tokens: a ratio of two."""
    kept = labels[:, 1:] != -100
    return outputs.logits[:, :-1][kept].square().sum() / outputs.logits.detach().exp().sum()


def loss_outside(folder: str, how: str, mesh: tuple[int, int] | None, gather: bool | None = None) -> dict[str, Any]:
    """Three steps and an evaluation where the Trainer computes the loss itself."""
    from transformers import Trainer

    fresh_accelerate()
    config = mesh and hf_usp.UspParallelismConfig(cp_size=mesh[0], ulysses_degree=mesh[1], gather_outputs=gather)
    args = training_arguments(
        folder,
        max_steps=3,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2 if mesh is None or mesh[0] == 4 else 1,
        per_device_eval_batch_size=2,
        logging_steps=1,
        learning_rate=0.05,
        optim="sgd",
        save_strategy="no",
        parallelism_config=config,
        label_smoothing_factor=0.1 if how == "label smoothing" else 0.0,
    )
    model = tiny_model("qwen2", "sdpa" if mesh is None else "usp")
    own: dict[str, Any] = {} if how == "label smoothing" else {"compute_loss_func": mean_square}
    trainer = Trainer(model=model, args=args, train_dataset=rows(12, 40), eval_dataset=rows(4, 40, False), **own)
    trainer.train()
    logs = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    return {
        "losses": [*logs, trainer.evaluate(metric_key_prefix="test")["test_loss"]],
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
    }


@pytest.mark.parametrize("how", ["label smoothing", "compute_loss_func"])
def test_a_loss_outside_the_model_equals_one_process(four_ranks: Ranks, tmp_path: Path, how: str) -> None:
    reference = loss_outside(str(tmp_path), how, None)
    assert len(reference["losses"]) == 4
    # A mean over a batch of its own is another one where data-parallel ranks share the batch.
    for mesh in ((4, 2), (2, 2)) if how == "label smoothing" else ((4, 2),):
        for mine in four_ranks.run(loss_outside, str(tmp_path), how, mesh):
            assert mine["losses"] == pytest.approx(reference["losses"], rel=2e-5)
            assert largest_difference(mine["weights"], reference["weights"]) < 1e-6


def refused_outside(folder: str, how: str) -> str:
    with pytest.raises(hf_usp.UspModelError) as refusal:
        loss_outside(folder, how, (4, 2), gather=False)
    return str(refusal.value)


@pytest.mark.parametrize("how", ["label smoothing", "compute_loss_func"])
def test_a_loss_outside_the_model_is_refused_of_shares(four_ranks: Ranks, tmp_path: Path, how: str) -> None:
    for message in four_ranks.run(refused_outside, str(tmp_path), how):
        assert how in message and "leave gather_outputs out" in message
