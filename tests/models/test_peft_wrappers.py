"""Wrappers of PEFT that call `model.forward(...)`: AdaLoRA, which adds to the loss; X-LoRA, which calls it twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hf_usp

from ..harness import prepared_modules, taken_gradients
from ..ranks import Ranks
from ..tiny import batch_of, largest_difference, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing")


def adapted(sharded: bool) -> Any:
    from peft import AdaLoraConfig, get_peft_model

    settings: dict[str, Any] = {
        "init_r": 4,
        "target_r": 2,
        "total_step": 8,
        "tinit": 1,
        "tfinal": 2,
        "init_lora_weights": False,
    }
    torch.manual_seed(5)
    lora = AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], orth_reg_weight=0.5, **settings)
    return get_peft_model(tiny_model("qwen2", "usp" if sharded else "sdpa", torch.float64), lora)


def train_adapted(folder: str, sharded: bool, batch: int = 2) -> dict[str, Any]:
    """AdaLoRA calls `model.forward(...)` and adds to the loss what every rank computes in full."""
    from ..integrations.adapters import train_model

    model = adapted(sharded)
    tokens: set[int] = set()
    # Without gradients `model.forward` is that of the whole batch, on each rank.
    model.get_base_model().lm_head.register_forward_hook(
        lambda m, args, out: tokens.add(out.shape[1]) if torch.is_grad_enabled() else None
    )
    found = train_model(model, folder, (2, 1) if sharded else None, batch=batch)
    return {"tokens": tokens, **{name: found[name] for name in ("losses", "evaluation", "weights")}}


def test_adalora_under_the_trainer_equals_one_process(two_ranks: Ranks, tmp_path: Path) -> None:
    reference = train_adapted(str(tmp_path / "one"), False)
    for mine in two_ranks.run(train_adapted, str(tmp_path / "mesh"), True):
        assert max(reference["tokens"]) == 39
        assert max(mine["tokens"]) == 20
        assert mine["losses"] == pytest.approx(reference["losses"], rel=1e-6)
        assert mine["evaluation"] == pytest.approx(reference["evaluation"], rel=1e-6)
        assert largest_difference(mine["weights"], reference["weights"]) < 1e-6


def mixture_of_adapters(folders: list[str], sharded: bool) -> Any:
    from peft import XLoraConfig, get_peft_model

    torch.manual_seed(5)
    adapters = {str(number): folder for number, folder in enumerate(folders)}
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=2, xlora_size=8, adapters=adapters)
    return get_peft_model(tiny_model("qwen2", "usp" if sharded else "sdpa", use_cache=False), config)


def mix(folders: list[str], sharded: bool) -> Any:
    """Loss and gradients of X-LoRA's classifier, which looks at the hidden states of a first pass; or a refusal."""
    model: Any = mixture_of_adapters(folders, sharded).train()
    wrapped = prepared_modules(model) if sharded else model
    try:
        loss = wrapped(**batch_of("plain")).loss
        loss.backward()
    except hf_usp.UspModelError as refusal:
        return str(refusal)
    return loss.item(), taken_gradients(model)


def test_x_lora(two_ranks: Ranks, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    folders = [str(tmp_path / name) for name in ("a", "b")]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(tiny_model("qwen2", "sdpa"), lora).save_pretrained(folder)
    loss, reference = mix(folders, False)
    assert any("xlora_classifier" in name for name in reference)
    for mine in two_ranks.run(mix, folders, True):
        assert not isinstance(mine, str), mine
        assert mine[0] == pytest.approx(loss, rel=1e-5)
        assert largest_difference(mine[1], reference) < 1e-6
