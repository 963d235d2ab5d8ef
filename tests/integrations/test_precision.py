"""Low precision under the stock Trainer: at most twice the error that one process makes in the same precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hf_usp

from ..harness import fresh_accelerate, training_arguments
from ..ranks import Ranks
from ..tiny import HYBRID, rows, tiny_model

# PEFT 0.21 reads a name that Transformers 5.23 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
# How low: the Trainer's autocast around weights in fp32, or the weights themselves.
WINDOWS = {"head_dim": 16, "sliding_window": 6}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama, autocast": ("llama", {}, "autocast"),
    "llama, bf16 weights": ("llama", {}, "bfloat16"),
    "llama, fp16 weights": ("llama", {}, "float16"),
    "softcap and windows, autocast": ("gemma2", WINDOWS, "autocast"),
    "sinks and experts, autocast": (
        "gpt_oss",
        {**WINDOWS, "num_local_experts": 4},
        "autocast",
    ),
    "recurrent layers, autocast": ("qwen3_5_text", HYBRID, "autocast"),
    "adapter, autocast": ("llama", {}, "adapter"),
}


def gradients(folder: str, sharded: bool, case: str, exact: bool = False) -> dict[str, torch.Tensor]:
    """Gradients of the first step of the stock Trainer, in fp64; `exact`: in fp32 throughout. And its `loss`."""
    from transformers import Trainer, TrainerCallback

    fresh_accelerate()
    family, changes, how = CASES[case]
    found: dict[str, torch.Tensor] = {}

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            named = kwargs["model"].named_parameters()
            found.update({n.removeprefix("module."): p.grad.double() for n, p in named if p.grad is not None})

    dtype = getattr(torch, how) if how in ("bfloat16", "float16") and not exact else torch.float32
    model = tiny_model(family, "usp" if sharded else "eager", dtype, initializer_range=0.1, **changes)
    if how == "adapter":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(5)
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    config = hf_usp.UspParallelismConfig(cp_size=4, ulysses_degree=2) if sharded else None
    args = training_arguments(
        folder,
        max_steps=1,
        parallelism_config=config,
        per_device_train_batch_size=2,
        save_strategy="no",
        logging_steps=1,
        optim="sgd",
        gradient_accumulation_steps=2,
        bf16=how in ("autocast", "adapter") and not exact,
        max_grad_norm=0.0,
    )
    trainer = Trainer(model=model, args=args, train_dataset=rows(4, 39), callbacks=[Gradients()])
    trainer.train()
    return {**found, "loss": torch.tensor(trainer.state.log_history[0]["loss"], dtype=torch.float64)}


def error(mine: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Of all gradients together, relative."""
    assert mine.keys() == exact.keys()
    wrong, right = (
        sum(float(x.square().sum()) for x in parts)
        for parts in ((mine[n] - exact[n] for n in exact if n != "loss"), (exact[n] for n in exact if n != "loss"))
    )
    return (wrong / right) ** 0.5


@pytest.mark.parametrize("case", CASES)
def test_at_most_twice_the_error_of_one_process(four_ranks: Ranks, tmp_path: Path, case: str) -> None:
    exact, one = (gradients(str(tmp_path), False, case, precise) for precise in (True, False))
    limit, of_loss = error(one, exact), abs(float(one["loss"] - exact["loss"]))
    assert limit > 1e-4  # it is low precision
    for mine in four_ranks.run(gradients, str(tmp_path), True, case):
        assert error(mine, exact) < 2 * limit
        assert abs(float(mine["loss"] - exact["loss"])) < 2 * of_loss + 1e-3


def test_autocast_around_the_backward_changes_nothing() -> None:
    """The kernel computes in the dtype of its inputs, both ways."""
    layout = hf_usp.shard(
        {"input_ids": torch.zeros(1, 19, dtype=torch.long)},
        hf_usp.UspMesh.build(ring_degree=1, ulysses_degree=1),
        kernel="eager",
    )["usp"]
    found = []
    for on in (False, True):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 19, heads, 8, requires_grad=True) for heads in (4, 2, 2))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            hf_usp.usp_attention(q, k, v, layout).square().sum().backward()
        found.append(torch.cat([x.grad.flatten() for x in (q, k, v) if x.grad is not None]))
    assert torch.equal(*found)
