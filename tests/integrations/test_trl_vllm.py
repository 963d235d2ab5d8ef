"""TRL's trainers with a vLLM server: it completes each prompt once, and every rank of a group gets the completions."""

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
from .trl_runs import Mesh, common, config_for, finished, tokenizer, words
from .vllm_server import served

pytestmark = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing")

SAMPLED = {"num_generations": 2, "max_completion_length": 7}
CASES: dict[str, dict[str, Any]] = {
    "GRPO": SAMPLED | {"scale_rewards": "batch"},
    "RLOO": SAMPLED | {"beta": 0.0},
    "Distillation": {"max_completion_length": 7},
    "OnlineDPO": {"max_length": 40, "max_new_tokens": 6},
}


def variety(completions: list[str], **_: Any) -> list[float]:
    return [len(set(text.split()) & {f"w{i}" for i in range(30)}) / 5 for text in completions]


def trainer_for(case: str, folder: str, mesh: Mesh, world: int, **settings: Any) -> Any:
    config = config_for(mesh)
    attention, groups = "sdpa" if mesh is None else "usp", world if mesh is None else world // mesh[0]
    arguments = common(folder, mesh, config) | {"per_device_train_batch_size": 4 // groups}
    arguments |= {"per_device_eval_batch_size": 4 // groups, "max_steps": 2, "use_vllm": True} | CASES[case] | settings
    keywords: dict[str, Any] = {"reward_funcs": variety}
    if case == "Distillation":
        keywords = {"teacher_model": tiny_model("llama", attention, initializer_range=0.05)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
        module: Any = importlib.import_module("trl.experimental.online_dpo" if case == "OnlineDPO" else "trl")
        prompts = Dataset.from_list([{"prompt": words(3 + i % 3, i)} for i in range(24)])
        return getattr(module, f"{case}Trainer")(
            model=tiny_model("llama", attention),
            args=getattr(module, f"{case}Config")(**arguments),
            train_dataset=prompts,
            eval_dataset=prompts.select(range(4)),
            processing_class=tokenizer(),
            **keywords,
        )


def run(case: str, folder: str, mesh: Mesh, world: int) -> dict[str, Any]:
    main = world == 1 or dist.get_rank() == 0
    with served(tokenizer(), main) as server:
        url = f"http://127.0.0.1:{server.server_port}" if server is not None else "unused"
        trainer = trainer_for(case, folder, mesh, world, vllm_mode="server", vllm_server_base_url=url)
        if case == "OnlineDPO":
            trainer.evaluate = dict  # it has none of prompts
        ended = finished(trainer, trainer.model)
        if server is not None:
            ended |= {"prompts": server.prompts, "updates": server.updates, "served": server.weights}
            assert server.requests > 2 and server.announced == server.sent
    return ended


def assert_same(mine: dict[str, Any], reference: dict[str, Any]) -> None:
    assert len(mine["logs"]) == len(reference["logs"]) == 3
    for here, there in zip(mine["logs"], reference["logs"], strict=True):
        assert here == pytest.approx(there, rel=2e-5, abs=1e-5, nan_ok=True)
    assert largest_difference(mine["weights"], reference["weights"]) < 1e-6
    if "prompts" in mine:
        assert mine["prompts"] == reference["prompts"]  # each once, in the order of one process
        assert mine["updates"] == reference["updates"] > 0
        assert largest_difference(mine["served"], reference["served"]) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_a_server_completes_each_prompt_once(two_ranks: Ranks, four_ranks: Ranks, tmp_path: Path, case: str) -> None:
    """GRPO with two data-parallel ranks against two processes without a mesh; the others against one process."""
    if case == "GRPO":
        first, second = two_ranks.run(run, case, str(tmp_path), None, 2)
        for rank, mine in enumerate(four_ranks.run(run, case, str(tmp_path), (2, 1), 4)):
            assert_same(mine, second if rank > 1 else first)
        return
    alone = run(case, str(tmp_path), None, 1)
    for mine in two_ranks.run(run, case, str(tmp_path), (2, 1), 2):
        assert_same(mine, alone)


def refusal(folder: str) -> str:
    with served(tokenizer(), dist.get_rank() == 0) as server:
        url = "unused" if server is None else f"http://127.0.0.1:{server.server_port}"
        trainer = trainer_for("GRPO", folder, (2, 1), 2, vllm_mode="server", vllm_server_base_url=url)
    trainer.args.vllm_mode = "colocate"  # an engine needs a GPU
    with pytest.raises(hf_usp.UspConfigError) as problem:
        trainer.train()
    assert trainer.state.global_step == 0
    return str(problem.value)


def test_engines_in_each_process_are_refused(two_ranks: Ranks, tmp_path: Path) -> None:
    for message in two_ranks.run(refusal, str(tmp_path)):
        assert 'vllm_mode="colocate" with batches that 2 ranks share' in message
