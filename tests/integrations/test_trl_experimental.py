"""TRL's experimental trainers on a mesh: losses made of logits outside the model, and completions that it samples.

Weights and all logged numbers equal one process; with data-parallel ranks, plain data parallelism of as many.
"""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from datasets import Dataset

import hf_usp

from ..ranks import Ranks
from ..tiny import largest_difference, tiny_model
from .trl_runs import Mesh, common, config_for, dataset, full, tokenizer, words

pytestmark = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing")

# Case -> the settings of its trainer, which is named before the comma.
CASES: dict[str, dict[str, Any]] = {
    "ORPO": {"beta": 0.5, "max_length": 40},
    "CPO": {"beta": 0.5, "max_length": 40, "loss_type": "sigmoid"},
    "CPO, simpo": {"beta": 0.5, "max_length": 40, "loss_type": "simpo", "cpo_alpha": 0.5},
    "GKD": {"lmbda": 0.5, "seq_kd": True, "beta": 0.3, "max_length": 40, "max_new_tokens": 6},
    "OnlineDPO": {"beta": 0.5, "max_length": 40, "max_new_tokens": 6, "missing_eos_penalty": 0.3},
    "SDFT": {"num_generations": 2, "max_completion_length": 6, "teacher_update_rate": 0.5, "distillation_topk": 8}
    | {"teacher_model_kind": "ema"},
    "SDPO": {"num_generations": 2, "max_completion_length": 6, "success_reward_threshold": 3.0}
    | {"scale_rewards": "batch", "distillation_weight": 0.5, "teacher_model_kind": "live"},
}
FOLDERS = {"OnlineDPO": "online_dpo"}


def numbers(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(int(word[1:]) for word in text.split() if word.startswith("w"))) / 50 for text in completions]


def model_of(folder: str, attention: str) -> Any:
    """The student, whose name is a folder from which a trainer may load its teacher."""
    model, path = tiny_model("llama", attention), f"{folder}/{attention}"
    if not dist.is_initialized() or dist.get_rank() == 0:
        tiny_model("llama", attention, initializer_range=0.03).save_pretrained(path)
    if dist.is_initialized():
        dist.barrier()
    model.config.name_or_path = path
    return model


def run(folder: str, mesh: Mesh, world: int, case: str, reward: Any = numbers) -> dict[str, Any]:
    """Three steps of a case on `world` processes: the logs and the weights."""
    kind, config = case.partition(",")[0], config_for(mesh)
    attention, groups = "sdpa" if mesh is None else "usp", world if mesh is None else world // mesh[0]
    keywords: dict[str, Any] = {}
    if kind in ("ORPO", "CPO"):
        data = dataset("preference")
    elif kind == "GKD":
        data, keywords = dataset("chat"), {"teacher_model": tiny_model("llama", attention, initializer_range=0.5)}
    else:
        hint = {"privileged_context": words(5, 50)} if kind == "SDFT" else {}
        data = Dataset.from_list([{"prompt": words(3 + i % 3, i), **hint} for i in range(24)])
        keywords = {} if kind == "SDFT" else {"reward_funcs": reward}
    arguments = common(folder, mesh, config) | {"per_device_train_batch_size": 4 // groups, "eval_strategy": "no"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
        module: Any = importlib.import_module(f"trl.experimental.{FOLDERS.get(kind, kind.lower())}")
        trainer = getattr(module, f"{kind}Trainer")(
            model=model_of(folder, attention),
            args=getattr(module, f"{kind}Config")(**arguments, **CASES[case]),
            train_dataset=data,
            processing_class=tokenizer(),
            **keywords,
        )
    trainer.train()
    skipped = ("runtime", "per_second", "epoch", "step_time")
    logs = [h for h in trainer.state.log_history if "loss" in h]
    return {
        "logs": [{k: v for k, v in log.items() if not any(s in k for s in skipped)} for log in logs],
        "weights": {name: full(p.detach()).clone() for name, p in trainer.model.named_parameters()},
    }


def assert_same(mine: dict[str, Any], reference: dict[str, Any]) -> None:
    assert len(mine["logs"]) == len(reference["logs"]) == 3
    for here, there in zip(mine["logs"], reference["logs"], strict=True):
        assert here == pytest.approx(there, rel=2e-5, abs=1e-5)
    assert largest_difference(mine["weights"], reference["weights"]) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_experimental_trainers_equal_one_process(two_ranks: Ranks, tmp_path: Path, case: str) -> None:
    alone = run(str(tmp_path), None, 1, case)
    assert all(log["grad_norm"] > 1e-3 for log in alone["logs"])
    for mine in two_ranks.run(run, str(tmp_path), (2, 1), 2, case):
        assert_same(mine, alone)


@pytest.mark.parametrize("case", ["OnlineDPO", "SDPO"])
def test_with_two_data_parallel_ranks(two_ranks: Ranks, four_ranks: Ranks, tmp_path: Path, case: str) -> None:
    """Trainers that find rows and rewards of each process, against two processes without a mesh."""
    both = two_ranks.run(run, str(tmp_path), None, 2, case)
    assert both[0]["logs"][0]["grad_norm"] > 1e-3
    for rank, mine in enumerate(four_ranks.run(run, str(tmp_path), (2, 1), 4, case)):
        assert_same(mine, both[rank // 2])


def by_rank(completions: list[str], **_: Any) -> list[float]:
    return [float(i * (1 - 2 * dist.get_rank())) for i, _ in enumerate(completions)]


def refusal(folder: str) -> str:
    with pytest.raises(hf_usp.UspBatchError) as problem:
        run(folder, (2, 1), 2, "OnlineDPO", by_rank)
    return str(problem.value)


def test_rewards_that_ranks_do_not_agree_on_are_refused(two_ranks: Ranks, tmp_path: Path) -> None:
    """OnlineDPO chooses a completion on every rank by the rewards of that rank."""
    for message in two_ranks.run(refusal, str(tmp_path)):
        assert "rewards of rank 1 that differ" in message and "hf_usp.once" in message
