"""The set-up that tests share: a fresh Accelerate, prepared models, runs of the stock Trainer and their references."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

import hf_usp
from hf_usp.memory.activation_offload import CHECKPOINTING

from .tiny import largest_difference, rows, tiny_model


def fresh_accelerate() -> None:
    """Forget the process's accelerator, as the start of another program would."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def training_arguments(folder: str, **settings: Any) -> Any:
    """`TrainingArguments` on the CPU that report nothing and write into `folder`."""
    from transformers import TrainingArguments

    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    return TrainingArguments(output_dir=folder, **quiet | settings)


def prepared(family: str = "llama", attention: str = "usp", compiled: str = "", **changes: Any) -> Any:
    """A model prepared over 2 x 2 ranks; `compiled` by the user or by Accelerate."""
    from accelerate import Accelerator

    fresh_accelerate()
    config = hf_usp.UspParallelismConfig(cp_size=4, ulysses_degree=2)
    backend = "EAGER" if compiled in ("accelerate", "head") else None
    model = tiny_model(family, attention, **changes)
    if compiled == "head":
        model = AutoModelForSequenceClassification.from_config(model.config, attn_implementation=attention)
    model = torch.compile(model, backend="eager") if compiled == "user" else model
    return Accelerator(cpu=True, parallelism_config=config, dynamo_backend=backend).prepare(model)


def run_trainer(folder: str, mesh: tuple[int, int | None, str] | None, setup: dict[str, Any]) -> dict[str, Any]:
    """Train, evaluate and predict with the stock Trainer; in one process when `mesh` is None."""
    from transformers import Trainer

    fresh_accelerate()
    world = 1 if mesh is None else 4
    data_parallel = 1 if mesh is None else world // mesh[0]
    config = None
    if mesh is not None:
        config = hf_usp.UspParallelismConfig(
            cp_size=mesh[0],
            ulysses_degree=mesh[1],
            sequence_order=mesh[2],
            gather_outputs=setup.get("gather", False),
            **{"loss_chunk_size": setup.get("chunk"), **setup.get("options", {})},
        )
    elif setup.get("chunk") or setup.get("options"):
        config = hf_usp.UspParallelismConfig(**{"loss_chunk_size": setup.get("chunk"), **setup.get("options", {})})
    arguments = {
        "per_device_train_batch_size": setup["batch"] // data_parallel,
        "per_device_eval_batch_size": setup.get("eval_batch", 2),
        "gradient_accumulation_steps": setup.get("accumulation", 1),
        "max_steps": setup["steps"],
        "logging_steps": 1,
        "learning_rate": setup.get("lr", 0.05),
        "lr_scheduler_type": "constant",
        "optim": setup.get("optim", "sgd"),
        "max_grad_norm": setup.get("clip", 0.5),
    }
    args = training_arguments(folder, save_strategy="no", parallelism_config=config, **arguments)
    model = tiny_model(setup.get("family", "llama"), "usp" if config else "eager", **setup.get("changes", {}))
    if "checkpointing" in setup:
        checkpointing(model, {"use_reentrant": setup["checkpointing"] == "reentrant"})
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=rows(setup["rows"], setup.get("length", 40)),
        eval_dataset=rows(setup.get("eval_rows", 7), 40),
    )
    trainer.train()
    result = {
        "losses": [h["loss"] for h in trainer.state.log_history if "loss" in h],
        "norms": [h["grad_norm"] for h in trainer.state.log_history if "grad_norm" in h],
        "counts": (trainer.state.global_step, trainer.state.epoch, trainer.state.max_steps),
        "weights": {name: p.detach().clone() for name, p in model.state_dict().items()},
    }
    if setup.get("evaluate"):
        result["evaluation"] = trainer.evaluate()["eval_loss"]
    if setup.get("gather"):
        prediction = trainer.predict(rows(7, 40))
        result["predicted"] = torch.from_numpy(prediction.predictions)
        result["labels"] = torch.from_numpy(prediction.label_ids)
        result["test_loss"] = prediction.metrics["test_loss"]
    return result


def one_process(setup: dict[str, Any]) -> dict[str, Any]:
    """`run_trainer` in this process: the reference of all meshes, computed once."""
    return _one_process(json.dumps(setup, sort_keys=True))


@cache
def _one_process(setup: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return run_trainer(folder, None, json.loads(setup))


def compare(mine: dict[str, Any], reference: dict[str, Any], weights: float = 1e-6, losses: float = 1e-5) -> None:
    """Counts, losses and final weights of two results of `run_trainer`."""
    assert mine["counts"] == reference["counts"]
    assert mine["losses"] == pytest.approx(reference["losses"], abs=losses)
    assert largest_difference(mine["weights"], reference["weights"]) < weights


def checkpointing(model: Any, keywords: dict[str, Any] | None) -> None:
    """Switch on checkpointing of all layers; Transformers 5.2x renamed it."""
    getattr(model, f"{CHECKPOINTING}_enable")(keywords)


def step(model: Any, **batch: Any) -> tuple[float, dict[str, torch.Tensor], Any]:
    """Loss, gradients and output of one step."""
    model.zero_grad()
    output = model(**batch, use_cache=False)
    (output.loss * 3).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.loss.item(), gradients, output


def relative(mine: Tensor, theirs: Tensor, floor: float = 1e-6) -> float:
    """Norm of the difference over the norm of `theirs`, which counts as `floor` at least."""
    return ((mine - theirs).norm() / theirs.norm().clamp_min(floor)).item()


def prepare(model: Any, ring: int, ulysses: int) -> Any:
    """Do to a model as `Accelerator.prepare` does."""
    mesh = hf_usp.UspMesh.build(ring_degree=ring, ulysses_degree=ulysses)
    return hf_usp.apply_context_parallel(model, mesh)


def step_errors(model: Any, reference: Any, batch: dict[str, Any]) -> dict[str, float]:
    """Relative errors of loss, outputs and gradients, averaged over ranks, of a prepared model against eager."""
    expected = reference(**batch)
    expected.loss.backward()
    out = model(**batch)
    out.loss.backward()
    errors = {"loss": abs(out.loss.item() / expected.loss.item() - 1)}
    for name in ("logits", "start_logits", "seq_relationship_logits"):
        if expected.get(name) is not None and out[name].shape == expected[name].shape:
            seen = torch.ones(expected[name].shape[:2]).bool()
            if expected[name].ndim == 3 and "attention_mask" in batch:
                seen = batch["attention_mask"].bool()
            errors[name] = relative(out[name].detach()[seen], expected[name].detach()[seen])
    theirs = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    # Some gradients are zero (a bias under a softmax over tokens) but for rounding.
    floor = 1e-3 * max(gradient.norm().item() for gradient in theirs.values())
    for name, parameter in model.named_parameters():
        assert (name in theirs) == (parameter.grad is not None), name
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            errors[name] = relative(parameter.grad / dist.get_world_size(), theirs[name], floor)
    return errors


def prepared_modules(*modules: nn.Module, **options: Any) -> Any:
    """Modules prepared over 2 ranks."""
    from accelerate import Accelerator

    fresh_accelerate()
    config = hf_usp.UspParallelismConfig(cp_size=2, ulysses_degree=1, **options)
    return Accelerator(cpu=True, parallelism_config=config).prepare(*modules)


def taken_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by name, which the model then has no longer."""
    found = {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
