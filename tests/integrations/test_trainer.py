"""The stock Trainer over a mesh follows one process: weights, losses, counts, evaluation and prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ..harness import compare, fresh_accelerate, one_process, run_trainer, training_arguments
from ..ranks import Ranks
from ..tiny import HYBRID, rows, tiny_model

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
    import hf_usp

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


def loss_outside(folder: str, how: str) -> str:
    """The message of the refusal when the Trainer computes the loss itself."""
    from transformers import Trainer

    import hf_usp

    fresh_accelerate()
    args = training_arguments(
        folder,
        max_steps=1,
        parallelism_config=hf_usp.UspParallelismConfig(cp_size=4, ulysses_degree=2),
        label_smoothing_factor=0.1 if how == "label smoothing" else 0.0,
    )
    own = {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: outputs.logits.mean()}
    trainer = Trainer(
        model=tiny_model(), args=args, train_dataset=rows(2, 40), **(own if how != "label smoothing" else {})
    )
    with pytest.raises(hf_usp.UspModelError) as refusal:
        trainer.train()
    return str(refusal.value)


@pytest.mark.parametrize("how", ["label smoothing", "compute_loss_func"])
def test_a_loss_outside_the_model_is_refused(four_ranks: Ranks, tmp_path: Path, how: str) -> None:
    for message in four_ranks.run(loss_outside, str(tmp_path), how):
        assert how in message and "label_smoothing_factor=0" in message
