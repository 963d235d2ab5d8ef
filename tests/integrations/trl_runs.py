"""TRL's trainers for tests: a tokenizer, data, common settings, what a run ends in and its comparison."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

import hf_usp

from ..harness import fresh_accelerate
from ..tiny import largest_difference

Mesh = tuple[int, int] | None
WORDS = [f"w{i}" for i in range(58)]
# Assistant turns lie between {% generation %} tags, from which TRL takes the mask of `assistant_only_loss`.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + ' <eos> ' }}"
    "{% endgeneration %}{% else %}{{ 'w0 ' + m['content'] + ' w1 ' }}{% endif %}{% endfor %}"
)


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<bos>", "<eos>", "<unk>", *WORDS]
    model = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    made.chat_template = TEMPLATE
    return made


def words(count: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator).tolist())


def dataset(kind: str, count: int = 24) -> Any:
    from datasets import Dataset

    lengths = [5 + 7 * i % 19 for i in range(count)]
    if kind == "text":
        rows: list[dict[str, Any]] = [{"text": words(n, i)} for i, n in enumerate(lengths)]
    elif kind == "completion":
        rows = [{"prompt": words(4, i), "completion": " " + words(n, 100 + i)} for i, n in enumerate(lengths)]
    elif kind == "preference":
        rows = [
            {"prompt": words(4, i), "chosen": " " + words(n, 100 + i), "rejected": " " + words(9, 200 + i)}
            for i, n in enumerate(lengths)
        ]
    else:
        turns = [("user", 3), ("assistant", 6), ("user", 2), ("assistant", 4)]
        rows = [
            {"messages": [{"role": role, "content": words(n + i % 5, 7 * i + n)} for role, n in turns]}
            for i in range(count)
        ]
    return Dataset.from_list(rows)


def config_for(mesh: Mesh) -> Any:

    fresh_accelerate()
    return None if mesh is None else hf_usp.UspParallelismConfig(cp_size=mesh[0], ulysses_degree=mesh[1])


def common(folder: str, mesh: Mesh, config: Any) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "parallelism_config": config,
        "per_device_train_batch_size": 2 if mesh is None else 2 * mesh[0] // 4,
        "per_device_eval_batch_size": 2,
        "max_steps": 3,
        "gradient_accumulation_steps": 2,
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "bf16": False,
    }


def full(weight: torch.Tensor) -> torch.Tensor:
    """A weight that FSDP2 may have sharded."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def finished(trainer: Any, model: Any) -> dict[str, Any]:
    trainer.train()
    evaluation = trainer.evaluate()
    skipped = ("runtime", "per_second", "epoch", "step_time")
    logs = [*(h for h in trainer.state.log_history if "loss" in h), evaluation]
    return {
        "logs": [{k: v for k, v in log.items() if not any(s in k for s in skipped)} for log in logs],
        "weights": {name: full(p.detach()).clone() for name, p in model.named_parameters()},
    }


# TRL averages ratios over the batches of an evaluation; two data-parallel ranks make one batch of two.
OF_A_BATCH = ("accuracy", "accuracies", "logits/chosen", "logits/rejected")


def compare(mine: dict[str, Any], reference: dict[str, Any], mesh: tuple[int, int]) -> None:
    assert len(mine["logs"]) == len(reference["logs"]) == 4
    for here, there in zip(mine["logs"], reference["logs"], strict=True):
        assert here.keys() == there.keys()
        names = [n for n in there if mesh[0] == 4 or not n.startswith("eval_") or not n.endswith(OF_A_BATCH)]
        assert {n: here[n] for n in names} == pytest.approx({n: there[n] for n in names}, rel=2e-5, abs=1e-5)
    assert largest_difference(mine["weights"], reference["weights"]) < 1e-6
