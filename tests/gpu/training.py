"""Parts of a step that run only on a GPU: the stock Trainer on two processes that share it, beside one process.

The cases are data, and the device is an argument: those that can run on CPU are rehearsed there (`test_rehearsal.py`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

import hf_usp

from ..harness import fresh_accelerate
from ..integrations.cpu_accelerator import cpu_as_accelerator, cpu_deepspeed
from ..tiny import HYBRID, rows, tiny_model

MESHES = {"ring": 1, "ulysses": 2}  # ulysses degrees of two processes


@dataclass(frozen=True)
class Case:
    """model: a family and changes to it. arguments: of the Trainer. config: of our mesh. needs: packages.

    limit: how far the weights may be from those of one process with the same arguments, over how far they moved; None
    where one process is not exact either: then twice its distance from one process in fp32. on_cpu: can be rehearsed.
    sharded: further arguments of the Trainer on the mesh, for FSDP2 or DeepSpeed.
    """

    model: tuple[str, dict[str, Any]] = ("qwen2", {})
    arguments: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    sharded: dict[str, Any] = field(default_factory=dict)
    bits: int = 0
    limit: float | None = 1e-4
    on_cpu: bool = True

    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [name for name in self.needs if find_spec(name) is None]


CHECKPOINTS = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
# Adam whose step is nearly the gradient's, so that rounding of small gradients does not turn it round.
ADAM = {"optim": "adamw_torch", "adam_epsilon": 1.0}
IN_HOST_MEMORY = {"device": "cpu", "pin_memory": False}


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    """DeepSpeed, with its own Adam: fused on the GPU, or for what is kept in host memory."""
    auto = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    adam = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
    stages = {"stage": stage, "stage3_param_persistence_threshold": 0, **settings}
    precision = {"fp16": {"enabled": "auto"}}
    return {"deepspeed": {**dict.fromkeys(auto, "auto"), "optimizer": adam, "zero_optimization": stages, **precision}}


FSDP2 = {
    "fsdp": True,
    "fsdp_config": {"fsdp_version": 2, "cpu_offload": True, "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]},
}
CASES: dict[str, Case] = {
    "fp32": Case(on_cpu=False),  # the rest of the tests are this on CPU
    "bf16": Case(arguments={"bf16": True}, limit=None),
    "fp16 with a loss scale": Case(arguments={"fp16": True, "max_grad_norm": 0.5}, limit=None, on_cpu=False),
    "offloaded checkpoints": Case(arguments=CHECKPOINTS, config={"offload_checkpoints": True, "loss_chunk_size": 16}),
    "Liger's kernels": Case(
        ("llama", {}), {"use_liger_kernel": True, "bf16": True}, needs=("liger_kernel",), limit=None, on_cpu=False
    ),
    "8 bits": Case(("llama", {}), CHECKPOINTS, needs=("bitsandbytes", "peft"), bits=8, limit=2e-2),
    "4 bits": Case(("llama", {}), CHECKPOINTS, needs=("bitsandbytes", "peft"), bits=4),
    "FSDP2, weights in host memory": Case(sharded=FSDP2),
    "DeepSpeed's fused Adam": Case(arguments=ADAM, sharded=zero(1), needs=("deepspeed",), on_cpu=False),
    "ZeRO-2, fp16, optimizer in host memory": Case(
        arguments={**ADAM, "fp16": True},
        sharded=zero(2, offload_optimizer=IN_HOST_MEMORY),
        needs=("deepspeed",),
        limit=2e-2,
        on_cpu=False,
    ),
    "ZeRO-3, all in host memory": Case(
        arguments=ADAM,
        sharded=zero(3, offload_optimizer=IN_HOST_MEMORY, offload_param=IN_HOST_MEMORY),
        needs=("deepspeed",),
        on_cpu=False,
    ),
    "flash-linear-attention": Case(
        ("qwen3_5_text", HYBRID), {"bf16": True}, needs=("fla", "causal_conv1d"), limit=None, on_cpu=False
    ),
}


def model_of(case: Case, device: str, attention: str, folder: str) -> Any:
    """The model, the same everywhere; with an adapter on quantized weights where the case has bits."""
    family, changes = case.model
    model = tiny_model(family, attention, hidden_size=64, intermediate_size=128, **changes)
    if case.sharded:  # DeepSpeed makes weights on the GPU, whose random numbers are others: all load what one saved
        if not torch.distributed.is_initialized():
            model.save_pretrained(folder)
        return type(model).from_pretrained(folder, attn_implementation=attention, dtype=torch.float32)
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
    case = CASES[name]
    sharded = case.sharded if ulysses is not None else {}
    with _accelerator(device, sharded):
        from transformers import Trainer, TrainingArguments

        fresh_accelerate()
        config = None
        if ulysses is not None:
            config = hf_usp.UspParallelismConfig(cp_size=2, ulysses_degree=ulysses, **case.config)
        options = {"optim": "sgd"} | ({} if exact else case.arguments) | deepcopy(sharded)
        if device == "cpu" and "fsdp_config" in options:
            options["fsdp_config"]["cpu_offload"] = False  # it pins memory; `test_fsdp2.py` goes without
        args = TrainingArguments(
            output_dir=folder,
            report_to=[],
            use_cpu=device == "cpu" and not sharded,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            parallelism_config=config,
            per_device_train_batch_size=2,
            max_steps=3,
            save_strategy="no",
            logging_steps=1,
            learning_rate=0.05,
            gradient_accumulation_steps=2,
            ddp_find_unused_parameters=False,
            **options,
        )
        # After the arguments: from_pretrained then partitions for ZeRO-3.
        model = model_of(case, device, "eager" if config is None else "usp", f"{folder}/base")
        before = trained(model)
        trainer = Trainer(model=model, args=args, train_dataset=rows(12, 39))
        trainer.train()
        scaler = trainer.accelerator.scaler
        return {
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "moved": {n: p - before[n] for n, p in trained(model).items()},
            "scale": None if scaler is None else scaler.get_scale(),
        }


def _accelerator(device: str, sharded: dict[str, Any]) -> AbstractContextManager[None]:
    """Accelerate shards on an accelerator alone; a rehearsal says that the CPU is one."""
    if device != "cpu" or not sharded:
        return nullcontext()
    return cpu_deepspeed() if "deepspeed" in sharded else cpu_as_accelerator()


def trained(model: Any) -> dict[str, torch.Tensor]:
    """Whole copies of the weights that are trained, in CPU memory."""
    return {n: _whole(p).float().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}


def _whole(weight: Any) -> torch.Tensor:
    if hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()
    if not hasattr(weight, "to_local"):
        return weight.detach()
    rows = [torch.empty(0)] * torch.distributed.get_world_size()  # FSDP2 deals them out
    torch.distributed.all_gather_object(rows, weight.detach().to_local().cpu())
    return torch.cat(rows)


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
    assert case.sharded or mine["scale"] == one["scale"]  # DeepSpeed has a scale of its own
    assert len(mine["losses"]) == 3
    return found
