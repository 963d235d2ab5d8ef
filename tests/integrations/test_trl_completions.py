"""Trainers of TRL that score or sample completions on a mesh: weights and all logged numbers equal one process.

With data-parallel ranks they equal plain data parallelism of as many processes.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ..ranks import Ranks
from ..tiny import FAMILIES, SIZES, largest_difference, tiny_model
from .cpu_accelerator import cpu_as_accelerator, cpu_deepspeed
from .trl_runs import Mesh, common, config_for, dataset, finished, tokenizer, words

# TRL 1.16 (whose default is gradient checkpointing) uses names that Transformers 5.23 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing")

AUTO = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
CASES: dict[str, dict[str, Any]] = {
    "kto": {"loss_type": "kto"},
    "kto, adapter": {"loss_type": "apo_zero_unpaired", "adapter": True},
    "grpo": {"scale_rewards": "batch", "entropy_coef": 0.01, "steps_per_generation": 4},
    "grpo, reference": {"beta": 0.2, "num_iterations": 2, "loss_type": "grpo"},
    "grpo, adapter": {
        "beta": 0.2,
        "adapter": True,
        "top_entropy_quantile": 0.5,
        "rollout_func": True,
        "gradient_checkpointing": False,
    },
    "rloo": {"beta": 0.1, "normalize_advantages": True, "reward_model": True},
    "distillation": {"beta": 0.5},
}
ADAPTED = {"distillation, adapter": {"beta": 0.5, "adapter": True}}


def variety(completions: list[str], **_: Any) -> list[float]:
    return [len(set(text.split())) / 5 for text in completions]


def numbers(completions: list[str], **_: Any) -> list[float | None]:
    """A reward of some completions only; the same for most of them."""
    found = [[int(word[1:]) for word in text.split() if word.startswith("w")] for text in completions]
    return [None if not some else float(max(some) > 50) for some in found]


def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions of another source: the prompt's words from its end, and the end of the text."""
    ids = trainer.processing_class(text=prompts)["input_ids"]
    completions = [[*row[::-1], 5 + i, 2] for i, row in enumerate(ids)]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


def reward_model(attention: str) -> Any:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(1)
    config = AutoConfig.for_model("qwen2", num_labels=1, **{**SIZES, **FAMILIES["qwen2"]})
    return AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)


def reference_folder(folder: str, attention: str) -> str:
    """TRL loads the reference of GRPO and RLOO by the name of the model; the first process writes it."""
    path = f"{folder}/{attention}"
    if not dist.is_initialized() or dist.get_rank() == 0:
        tiny_model("llama", attention, initializer_range=0.03).save_pretrained(path)
    if dist.is_initialized():
        dist.barrier()
    return path


AROUND: dict[str, tuple[Any, dict[str, Any]]] = {
    "": (nullcontext, {}),
    "ZeRO-2": (
        cpu_deepspeed,
        {"use_cpu": False, "deepspeed": dict.fromkeys(AUTO, "auto") | {"zero_optimization": {"stage": 2}}},
    ),
    "FSDP2": (
        cpu_as_accelerator,
        {
            "use_cpu": False,
            "fsdp": True,
            "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
        },
    ),
}


def run(
    folder: str, mesh: Mesh, world: int, case: str, around: str = "", generate: str = "whole", **changes: Any
) -> dict[str, Any]:
    """Three steps and an evaluation of a case on `world` processes, without a mesh in plain data parallelism."""
    with AROUND[around][0]():
        trainer = trainer_for(folder, mesh, world, case, AROUND[around][1] | changes, generate)
        return finished(trainer, trainer.model)


def trainer_for(
    folder: str, mesh: Mesh, world: int, case: str, wrapping: dict[str, Any], generate: str = "whole"
) -> Any:
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    settings = dict((CASES | ADAPTED)[case])
    kind = case.partition(",")[0]
    groups = world if mesh is None else world // mesh[0]
    attention = "sdpa" if mesh is None else "usp"
    config = config_for(mesh)
    if config is not None:
        config.generate = generate
    arguments = common(folder, mesh, config)
    arguments |= {"per_device_train_batch_size": 4 // groups, "per_device_eval_batch_size": 4 // groups} | wrapping
    model = tiny_model("llama", attention)
    keywords: dict[str, Any] = {"model": model, "processing_class": tokenizer()}
    if settings.pop("adapter", False):
        keywords["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    elif kind in ("grpo", "rloo") and settings.get("beta"):
        model.config.name_or_path = reference_folder(folder, attention)
    prompts = Dataset.from_list([{"prompt": words(3 + i % 3, i)} for i in range(24)])
    sampled = {"max_completion_length": 8, "temperature": 1.0}
    made: Any = trl
    if kind == "kto":
        settings |= {"max_length": 40, "beta": 0.5}
        data = dataset("completion").map(lambda row, i: {"label": bool(i % 3)}, with_indices=True)
        if "peft_config" not in keywords:
            keywords["ref_model"] = tiny_model("llama", attention, initializer_range=0.03)
        make, make_config = made.KTOTrainer, made.KTOConfig
    elif kind == "distillation":
        data, settings = prompts, settings | sampled
        keywords["teacher_model"] = tiny_model("qwen3", attention, initializer_range=0.05)
        make, make_config = made.DistillationTrainer, made.DistillationConfig
    else:
        data, settings = prompts, settings | sampled | {"num_generations": 2}
        keywords["reward_funcs"] = [variety, numbers]
        if settings.pop("reward_model", False):
            keywords["reward_funcs"].append(reward_model(attention))
            keywords["reward_processing_classes"] = [None, None, tokenizer()]
        if settings.pop("rollout_func", False):
            keywords["rollout_func"] = rollout
        make, make_config = getattr(made, f"{kind.upper()}Trainer"), getattr(made, f"{kind.upper()}Config")
    torch.manual_seed(3)  # of the adapter's factors
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are using 'rollout_func'")  # experimental
        trainer = make(
            args=make_config(**arguments, **settings),
            train_dataset=data,
            eval_dataset=data.select(range(4)),
            **keywords,
        )
    return trainer


def assert_same(mine: dict[str, Any], reference: dict[str, Any]) -> None:
    assert len(mine["logs"]) == len(reference["logs"]) > 2
    for here, there in zip(mine["logs"], reference["logs"], strict=True):
        assert here.keys() == there.keys()
        assert here == pytest.approx(there, rel=2e-5, abs=1e-5, nan_ok=True)
    assert largest_difference(mine["weights"], reference["weights"]) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_completions_equal_one_process(two_ranks: Ranks, four_ranks: Ranks, tmp_path: Path, case: str) -> None:
    """On 2 ranks, on 2 x 2, and with two data-parallel ranks against two processes without a mesh."""
    folder = str(tmp_path)
    alone = run(folder, None, 1, case)
    assert {"loss", "grad_norm", "entropy"} <= alone["logs"][0].keys()
    for mine in four_ranks.run(run, folder, (4, 2), 4, case):
        assert_same(mine, alone)
    if case in ("kto", "grpo", "rloo", "distillation"):
        both = two_ranks.run(run, folder, None, 2, case)
        for rank, mine in enumerate(four_ranks.run(run, folder, (2, 1), 4, case)):
            assert_same(mine, both[rank // 2])
    else:
        for mine in two_ranks.run(run, folder, (2, 1), 2, case):
            assert_same(mine, alone)


@pytest.mark.parametrize("around", ["ZeRO-2", "FSDP2"])
def test_sharded_weights(two_ranks: Ranks, tmp_path: Path, around: str) -> None:
    alone = run(str(tmp_path), None, 1, "grpo, reference")
    for mine in two_ranks.run(run, str(tmp_path), (2, 1), 2, "grpo, reference", around):
        assert_same(mine, alone)


@pytest.mark.parametrize("case", ["kto", "rloo", "distillation"])
def test_sharded_weights_of_other_trainers(two_ranks: Ranks, tmp_path: Path, case: str) -> None:
    alone = run(str(tmp_path), None, 1, case, max_steps=2)
    for around in ("ZeRO-2", "FSDP2"):
        for mine in two_ranks.run(run, str(tmp_path), (2, 1), 2, case, around, max_steps=2):
            assert_same(mine, alone)


def test_distillation_with_an_adapter(two_ranks: Ranks, tmp_path: Path) -> None:
    alone = run(str(tmp_path), None, 1, *ADAPTED, max_steps=2)
    assert any("lora" in name for name in alone["weights"])
    for mine in two_ranks.run(run, str(tmp_path), (2, 1), 2, *ADAPTED, max_steps=2):
        assert_same(mine, alone)


@pytest.mark.parametrize(("generate", "around"), [("rows", ""), ("sharded", ""), ("sharded", "FSDP2")])
def test_rollouts(four_ranks: Ranks, two_ranks: Ranks, tmp_path: Path, generate: str, around: str) -> None:
    """Completions that ranks sample together are those that one process samples."""
    case, folder = "grpo, reference" if around else "grpo", str(tmp_path)
    ranks, mesh = (two_ranks, (2, 1)) if around else (four_ranks, (4, 2))
    alone = run(folder, None, 1, case)
    for mine in ranks.run(run, folder, mesh, mesh[0], case, around, generate):
        assert_same(mine, alone)
