"""Counts of the stock Trainer over a mesh: tokens averaged over devices or not, input tokens seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import hf_usp

from ..harness import fresh_accelerate, training_arguments
from ..ranks import Ranks
from ..tiny import largest_difference, rows, tiny_model


def run_trainer(folder: str, mesh: tuple[int, int] | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """Four SGD steps of the stock Trainer and an evaluation, on a mesh (cp_size, ulysses_degree) or without one."""
    from transformers import Trainer

    fresh_accelerate()
    config = None if mesh is None else hf_usp.UspParallelismConfig(cp_size=mesh[0], ulysses_degree=mesh[1])
    args = training_arguments(
        folder,
        save_strategy="no",
        max_steps=4,
        parallelism_config=config,
        optim="sgd",
        learning_rate=0.05,
        logging_steps=1,
        lr_scheduler_type="constant",
        max_grad_norm=0.5,
        **arguments,
    )
    model = tiny_model("llama", "eager" if config is None else "usp")
    trainer = Trainer(model=model, args=args, train_dataset=rows(16, 37), eval_dataset=rows(3, 37))
    trainer.train()
    return {
        "losses": [h["loss"] for h in trainer.state.log_history if "loss" in h],
        "evaluation": trainer.evaluate()["eval_loss"],
        "weights": {name: p.detach().clone() for name, p in model.state_dict().items()},
        "seen": trainer.state.num_input_tokens_seen,
    }


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("mesh", [(4, 2), (2, 1)], ids=str)
def test_tokens_not_averaged_over_devices(
    four_ranks: Ranks, two_ranks: Ranks, tmp_path: Path, mesh: tuple[int, int], accumulation: int
) -> None:
    """Each data-parallel rank divides by its own tokens; the reference has as many of these and no mesh."""
    arguments = {
        "average_tokens_across_devices": False,
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 1,
        "include_num_input_tokens_seen": "all",
    }
    if mesh[0] == 4:
        reference = run_trainer(str(tmp_path), None, arguments)
    else:
        reference = two_ranks.run(run_trainer, str(tmp_path), None, arguments)[0]
    for mine in four_ranks.run(run_trainer, str(tmp_path), mesh, arguments):
        assert mine["losses"] == pytest.approx(reference["losses"], abs=1e-5)
        assert mine["evaluation"] == pytest.approx(reference["evaluation"], abs=1e-5)
        assert largest_difference(mine["weights"], reference["weights"]) < 1e-6
        assert mine["seen"] == reference["seen"] == 4 * accumulation * 37 * (4 // mesh[0])


@pytest.mark.parametrize("averaged", [True, False])
def test_input_tokens_are_counted_once(four_ranks: Ranks, tmp_path: Path, averaged: bool) -> None:
    arguments = {"average_tokens_across_devices": averaged, "include_num_input_tokens_seen": "non_padding"}
    reference = run_trainer(str(tmp_path), None, arguments)
    for mine in four_ranks.run(run_trainer, str(tmp_path), (4, 2), arguments):
        assert mine["seen"] == reference["seen"] == 4 * 8 * 37


def test_token_counts_are_left_alone() -> None:
    """By the Trainer of Transformers 5.17, which rounds what it divides, and by that of 5.23."""
    config = hf_usp.UspParallelismConfig(cp_size=4).of_groups()
    assert config.non_data_parallel_size == config.cp_size == 1
