"""Services for trainers that sample completions: chunks of prompts, statistics, random numbers, `once`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

import hf_usp
from hf_usp.integrations.completions import deviation
from hf_usp.integrations.random_state import share_random_state

from ..ranks import Ranks
from ..tiny import tiny_model
from .trl_runs import common, config_for, finished, tokenizer, words

pytestmark = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing")


@pytest.mark.parametrize("copies", [1, 2, 4])
def test_a_deviation_counts_copies_once(copies: int) -> None:
    from trl.trainer.utils import nanstd

    rewards = torch.tensor([1.0, 2.0, float("nan"), 7.0, 3.0, 3.5])
    repeated = rewards.repeat(copies)
    torch.testing.assert_close(deviation(nanstd, copies, repeated), nanstd(rewards))
    groups = repeated.view(-1, 2)  # of one prompt: there once
    torch.testing.assert_close(deviation(nanstd, copies, groups, dim=1), nanstd(groups, dim=1), equal_nan=True)


def drawn(alike: bool) -> list[float]:
    """One number of each generator, after ranks were seeded each by its own."""
    rank = dist.get_rank()
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(7 if alike else 7 + rank)
    share_random_state(2)
    share_random_state(2)  # ranks of a group are alike by now, and groups are not
    return [torch.rand(()).item(), random.random(), float(np.random.rand())]


def test_ranks_of_a_group_draw_the_numbers_of_one_process(four_ranks: Ranks) -> None:
    alone = []
    for seed in (7, 8):
        torch.manual_seed(seed)
        alone.append([torch.rand(()).item(), random.Random(seed).random(), float(np.random.RandomState(seed).rand())])
    assert four_ranks.run(drawn, False) == [alone[0], alone[0], alone[1], alone[1]]
    assert four_ranks.run(drawn, True) == [alone[0]] * 4


SEEN: list[str] = []


def length(completions: list[str], prompts: list[str], **_: Any) -> list[float]:
    SEEN.extend(prompts)
    return [float(len(text)) for text in completions]


def by_rank(completions: list[str], **_: Any) -> list[float]:
    return [float(i + dist.get_rank()) for i, _ in enumerate(completions)]


def grpo(folder: str, reward: Any, streamed: bool = False, chunk: int | None = None, **settings: Any) -> dict[str, Any]:
    """Three steps of GRPO on two ranks that share their prompts."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    SEEN.clear()
    data: Any = Dataset.from_list([{"prompt": words(3 + i % 3, i)} for i in range(16)])
    arguments = common(folder, (2, 1), config_for((2, 1))) | {"per_device_train_batch_size": 2}
    arguments |= {"num_generations": 2, "max_completion_length": 4, "gradient_accumulation_steps": 2} | settings
    args = GRPOConfig(**arguments)
    if chunk is not None:
        args.generation_batch_size = chunk
    trainer = GRPOTrainer(
        model=tiny_model("llama"),
        reward_funcs=reward,
        args=args,
        train_dataset=data.to_iterable_dataset() if streamed else data,
        eval_dataset=Dataset.from_list([{"prompt": words(3, 100 + i)} for i in range(2)]),
        processing_class=tokenizer(),
    )
    return finished(trainer, trainer.model) | {"prompts": list(dict.fromkeys(SEEN))}


def refusal(folder: str, reward: Any, **settings: Any) -> str:
    with pytest.raises(hf_usp.UspError) as problem:
        grpo(folder, reward, **settings)
    return f"{type(problem.value).__name__}: {problem.value}"


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "groups on several ranks": ("4 completions of each prompt in batches of 2 rows", {"num_generations": 4}),
    "chunks": ("chunks of 6 rows, for 1 data-parallel rank(s) with batches of 4 rows", {"chunk": 6}),
    "streams": ("set args.generation_batch_size = 4", {"streamed": True}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_first_step(two_ranks: Ranks, tmp_path: Path, case: str) -> None:
    words_of_it, settings = REFUSED[case]
    steps = {"steps_per_generation": 1} if case == "groups on several ranks" else {}
    for message in two_ranks.run(refusal, str(tmp_path), length, **settings, **steps):
        assert words_of_it in message


def test_every_prompt_is_sampled_once_also_of_a_stream(two_ranks: Ranks, tmp_path: Path) -> None:
    first, second = two_ranks.run(grpo, str(tmp_path), length)
    assert first["prompts"] == second["prompts"]
    assert len(first["prompts"]) == 3 * 2 + 2  # two prompts of two completions a step; and those of the evaluation
    for mine in two_ranks.run(grpo, str(tmp_path), length, streamed=True, chunk=4):
        assert len(mine["prompts"]) == 3 * 2 + 2


def sampled_once(folder: str) -> tuple[float, int]:
    calls: list[int] = []

    def judge(completions: list[str], **_: Any) -> list[float]:
        calls.append(1)
        return by_rank(completions)

    return grpo(folder, hf_usp.once(judge))["logs"][0]["rewards/judge/mean"], len(calls)


def test_rewards_that_ranks_do_not_agree_on_are_refused_and_once_mends_it(two_ranks: Ranks, tmp_path: Path) -> None:
    for message in two_ranks.run(refusal, str(tmp_path), by_rank):
        assert "UspBatchError" in message and "rewards of rank 1 that differ" in message and "hf_usp.once" in message
    (mean, calls), (other, none) = two_ranks.run(sampled_once, str(tmp_path))
    assert mean == other == 1.5  # 0 to 3
    assert calls > 0 and none == 0


class Rollouts(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter([{"input_ids": torch.ones(2, 8, dtype=torch.int64)}])


class Empty(Rollouts):
    """TRL's asynchronous trainers give it to all ranks but the first."""


def rows_on_the_first_rank() -> str:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, parallelism_config=config_for((2, 1)))
    loader: Any = DataLoader(Empty() if dist.get_rank() else Rollouts(), batch_size=1)
    with pytest.raises(hf_usp.UspConfigError) as problem:
        accelerator.prepare(loader)
    return str(problem.value)


def test_rows_that_only_the_first_rank_has_are_refused(two_ranks: Ranks) -> None:
    for message in two_ranks.run(rows_on_the_first_rank):
        assert "kind of iterable dataset is 'Rollouts' on rank 0, 'Empty' on rank 1" in message


def once_by_hand() -> list[Any]:
    mesh = hf_usp.UspMesh.build(ring_degree=2, ulysses_degree=1)
    rank, found = dist.get_rank(), []

    def name(fail: str = "") -> Any:
        if fail == "raise":
            raise KeyError("no judge")
        return (lambda: None) if fail else {"rank": dist.get_rank()}

    shared = hf_usp.once(name, mesh)
    found.append((shared.__name__, shared()))
    for fail, other in (("raise", KeyError), ("result", Exception)):
        with pytest.raises(hf_usp.UspRankError if rank % 2 else other) as problem:
            shared(fail)
        found.append(str(problem.value))

    async def judge() -> None:
        pass

    with pytest.raises(hf_usp.UspConfigError, match="asynchronous"):
        hf_usp.once(judge)
    return found


def test_once_hands_out_the_first_ranks_result_or_failure(four_ranks: Ranks) -> None:
    for rank, (result, raised, unpickled) in enumerate(four_ranks.run(once_by_hand)):
        assert result == ("name", {"rank": rank // 2 * 2})
        assert "no judge" in raised
        assert "pickle" in unpickled or "local object" in unpickled
    assert hf_usp.once(partial(max, 3))(4) == 4  # without a mesh it runs as it is
