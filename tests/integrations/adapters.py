"""Training an adapter with the stock Trainer, and comparing two runs of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_usp

from ..harness import fresh_accelerate, training_arguments
from ..tiny import largest_difference, rows


def train_model(
    model: Any, folder: str, mesh: tuple[int, int] | None, checkpointing: bool = False, batch: int = 2, **options: Any
) -> dict[str, Any]:
    """Four steps of the stock Trainer on an adapter, saved in `folder`; in one process when `mesh` is None."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    fresh_accelerate()
    gradients: list[dict[str, torch.Tensor]] = []

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            named = kwargs["model"].named_parameters()
            gradients.append({name.removeprefix("module."): p.grad.clone() for name, p in named if p.requires_grad})

    config = None if mesh is None else hf_usp.UspParallelismConfig(*mesh, **options)
    # Renamed in Transformers 5.2x; the old name warns there.
    renamed = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if renamed else "gradient_checkpointing"
    args = training_arguments(
        folder,
        parallelism_config=config,
        per_device_train_batch_size=batch,
        max_steps=4,
        save_strategy="no",
        logging_steps=1,
        learning_rate=0.05,
        optim="sgd",
        gradient_accumulation_steps=2,
        ddp_find_unused_parameters=False,
        **{name: checkpointing},
    )
    trainer = Trainer(model=model, args=args, train_dataset=rows(16, 39), eval_dataset=rows(3, 39))
    trainer.add_callback(Gradients())
    trainer.train()
    trainer.save_model(folder)
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "evaluation": trainer.evaluate()["eval_loss"],
        "gradients": gradients,
        "weights": {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad},
    }


def compare(mine: dict[str, Any], reference: dict[str, Any], evaluation: float = 1e-6) -> None:
    assert mine["losses"] == pytest.approx(reference["losses"], abs=1e-6)
    assert mine["evaluation"] == pytest.approx(reference["evaluation"], abs=evaluation)
    assert len(mine["gradients"]) == 4
    for here, there in zip(mine["gradients"], reference["gradients"], strict=True):
        assert all(bool(gradient.any()) for gradient in there.values())
        assert largest_difference(here, there) < 1e-6
    assert largest_difference(mine["weights"], reference["weights"]) < 1e-6
