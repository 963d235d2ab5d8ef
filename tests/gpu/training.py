"""What a training step does only on a GPU: the stock Trainer on two processes that share it, beside one process.

The cases are data, and the device is an argument: those that can run on CPU are rehearsed there (`test_rehearsal.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

import hf_usp

from ..tiny import HYBRID, rows, tiny_model

MESHES = {"ring": 1, "ulysses": 2}  # ulysses degrees of two processes


@dataclass(frozen=True)
class Case:
    """model: a family and changes to it. arguments: of the Trainer. config: of our mesh. needs: packages.

    limit: how far the weights may be from those of one process with the same arguments, over how far they moved; None
    where one process is not exact either: then twice its distance from one process in fp32. on_cpu: can be rehearsed.
    """

    model: tuple[str, dict[str, Any]] = ("qwen2", {})
    arguments: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    bits: int = 0
    limit: float | None = 1e-4
    on_cpu: bool = True

    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [name for name in self.needs if find_spec(name) is None]


CHECKPOINTS = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
CASES: dict[str, Case] = {
    "fp32": Case(on_cpu=False),  # the rest of the tests are this on CPU
    "bf16": Case(arguments={"bf16": True}, limit=None),
    "fp16 with a loss scale": Case(arguments={"fp16": True, "max_grad_norm": 0.5}, limit=None, on_cpu=False),
    "offloaded checkpoints": Case(arguments=CHECKPOINTS, config={"offload_checkpoints": True, "loss_chunk": 16}),
    "Liger's kernels": Case(
        ("llama", {}), {"use_liger_kernel": True, "bf16": True}, needs=("liger_kernel",), limit=None, on_cpu=False
    ),
    "8 bits": Case(("llama", {}), CHECKPOINTS, needs=("bitsandbytes", "peft"), bits=8, limit=2e-2),
    "4 bits": Case(("llama", {}), CHECKPOINTS, needs=("bitsandbytes", "peft"), bits=4),
    "flash-linear-attention": Case(
        ("qwen3_5_text", HYBRID), {"bf16": True}, needs=("fla", "causal_conv1d"), limit=None, on_cpu=False
    ),
}


def model_of(case: Case, device: str, attention: str, folder: str) -> Any:
    """The model, the same everywhere; with an adapter on quantized weights where the case has bits."""
    family, changes = case.model
    model = tiny_model(family, attention, hidden_size=64, intermediate_size=128, **changes)
    if not case.bits:
        return model
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if not torch.distributed.is_initialized():  # one process comes first; what it saved is loaded by all
        model.save_pretrained(folder)
    settings = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        if case.bits == 4
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, attn_implementation=attention, dtype=torch.float32, device_map=device
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.enable_input_require_grads()
    torch.manual_seed(5)
    return get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))


def train(folder: str, device: str, name: str, ulysses: int | None, exact: bool = False) -> dict[str, Any]:
    """Three steps of the stock Trainer; in one process where `ulysses` is None; `exact`: without the case's options.

    Returns how far each trained weight moved, the losses, and the loss scale if there is one.
    """
    from accelerate.state import AcceleratorState, GradientState
    from transformers import Trainer, TrainingArguments

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    case = CASES[name]
    config = None
    if ulysses is not None:
        config = hf_usp.UspParallelismConfig(cp_size=2, ulysses_degree=ulysses, **case.config)
    model = model_of(case, device, "eager" if config is None else "usp", f"{folder}/base")
    before = {n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}
    args = TrainingArguments(
        output_dir=folder, report_to=[], use_cpu=device == "cpu", disable_tqdm=True, dataloader_pin_memory=False,
        parallelism_config=config, per_device_train_batch_size=2, max_steps=3, save_strategy="no", logging_steps=1,
        learning_rate=0.05, optim="sgd", gradient_accumulation_steps=2, ddp_find_unused_parameters=False,
        **({} if exact else case.arguments),
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=rows(12, 39))
    trainer.train()
    scaler = trainer.accelerator.scaler
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "moved": {n: p.detach().cpu() - before[n] for n, p in model.named_parameters() if p.requires_grad},
        "scale": None if scaler is None else scaler.get_scale(),
    }


def distance(mine: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of all movements together, over how far the other moved."""
    assert mine.keys() == other.keys()
    wrong, right = (
        sum(float(x.double().square().sum()) for x in parts)
        for parts in ((mine[n] - other[n] for n in other), other.values())
    )
    assert right > 0
    return (wrong / right) ** 0.5


def compare(mine: dict[str, Any], one: dict[str, Any], exact: dict[str, Any], case: Case) -> float:
    """Assert that a rank of the mesh is as near as the case wants; returns the distance."""
    reference, limit = (
        (one, case.limit) if case.limit is not None else (exact, 2 * distance(one["moved"], exact["moved"]))
    )
    found = distance(mine["moved"], reference["moved"])
    assert found <= limit, f"{found} of {limit}"
    assert mine["scale"] == one["scale"]
    assert len(mine["losses"]) == 3
    return found
