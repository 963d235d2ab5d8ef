"""Liger's fused loss under sharding: a forward of its shape, on plain torch (its kernels are Triton's).

Liger replaces the forward of a causal language model by one that in training computes the loss from hidden states and
the weight of the head, without logits. With a shard of a batch it must take `shift_labels` and
`num_items_in_batch`; versions that do are exact, and the self-check finds those that do not.
"""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

import pytest
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutputWithPast

import hf_usp

from ..harness import fresh_accelerate, training_arguments
from ..ranks import Ranks
from ..tiny import largest_difference, rows, tiny_model


def fuse(model: Any, heeds_shifted: bool = True) -> Any:
    """As `_apply_liger_kernel_to_instance` does: another forward on the instance."""
    stock = model.forward

    def lce_forward(self: Any, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        if not self.training or labels is None:
            return stock(input_ids=input_ids, labels=labels, **kwargs)
        output = self.model(input_ids=input_ids, **kwargs)
        shifted = kwargs.get("shift_labels") if heeds_shifted else None
        if shifted is None:
            shifted = functional.pad(labels, (0, 1), value=-100)[..., 1:]
        logits = self.lm_head(output.last_hidden_state).flatten(0, -2).float()
        items = kwargs.get("num_items_in_batch")
        loss = functional.cross_entropy(logits, shifted.flatten(), reduction="mean" if items is None else "sum")
        return CausalLMOutputWithPast(loss=loss if items is None else loss / items, logits=None)

    model.forward = MethodType(lce_forward, model)
    return model


def train(folder: str, sharded: bool, fused: bool = True, heeds_shifted: bool = True) -> Any:
    from transformers import Trainer

    fresh_accelerate()
    config = hf_usp.UspParallelismConfig(cp_size=2, ulysses_degree=1) if sharded else None
    model = tiny_model("qwen2", "usp" if sharded else "sdpa")
    args = training_arguments(
        folder,
        max_steps=3,
        parallelism_config=config,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="no",
        logging_steps=1,
        learning_rate=0.05,
        optim="sgd",
    )
    if fused:
        fuse(model, heeds_shifted)
    trainer = Trainer(model=model, args=args, train_dataset=rows(12, 39), eval_dataset=rows(3, 39))
    try:
        trainer.train()
    except hf_usp.UspModelError as error:
        return str(error)
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "evaluation": trainer.evaluate()["eval_loss"],
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
    }


def test_a_fused_loss_that_takes_shifted_labels_is_exact(two_ranks: Ranks, tmp_path: Path) -> None:
    reference = train(str(tmp_path), False, fused=False)
    for mine in two_ranks.run(train, str(tmp_path), True):
        assert mine["losses"] == pytest.approx(reference["losses"], abs=1e-5)
        assert mine["evaluation"] == pytest.approx(reference["evaluation"], abs=1e-5)
        assert largest_difference(mine["weights"], reference["weights"]) < 1e-6


def test_one_that_shifts_them_itself_is_found(two_ranks: Ranks, tmp_path: Path) -> None:
    for message in two_ranks.run(train, str(tmp_path), True, True, False):
        assert "computes something else" in message and "loss" in message
