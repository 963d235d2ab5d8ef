"""The needle in a haystack: its texts, its scores, the script and the callback."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import needle
import pytest
import texts
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Trainer

import hf_usp

from ..harness import fresh_accelerate, training_arguments
from ..ranks import Ranks
from ..tiny import rows
from .launch import TINY_LLAMA, alone, several

GRID: dict[str, Any] = {"lengths": [320, 600], "depths": [0.0, 0.5, 1.0], "samples": 2}


class Reader:
    """As much of a model as the grid asks for. It reads the prompt, as far back as `memory` bytes."""

    device, training = torch.device("cpu"), True

    def __init__(self, memory: int) -> None:
        self.memory = memory

    def eval(self) -> None:
        self.training = False

    def train(self, mode: bool) -> None:
        self.training = mode

    def generate(self, ids: Tensor, **_: Any) -> Tensor:
        assert not self.training
        answers = []
        for row in ids.tolist():
            text = bytes(row[-self.memory :]).decode()
            name = text.rsplit("number of ", 1)[1].removesuffix(" is")
            while (link := re.search(rf"of {name} is that of (\w+)\.", text)) is not None:
                name = link[1]
            number = re.search(rf"of {name} is (\d+)\.", text)
            answers.append(list(f" {number[1]}.".encode() if number else b" ?????."))
        return torch.cat([ids, torch.tensor(answers)], dim=1)


@pytest.mark.parametrize("task", needle.TASKS)
def test_who_reads_everything_finds_everything(task: str) -> None:
    reader, tokenizer = Reader(10_000), texts.ByteTokenizer()
    grid = needle.needle_grid(reader, tokenizer, task=task, **(GRID | {"lengths": [600, 900]}))
    assert set(grid.values()) == {1.0} and len(grid) == 6 and reader.training
    for length, depth in grid:
        prompt, _ = needle.make_prompt(tokenizer, task, length, depth, 0)
        assert len(prompt) == length


def test_who_forgets_misses_what_is_far() -> None:
    grid = needle.needle_grid(Reader(330), texts.ByteTokenizer(), **GRID)
    assert [grid[320, depth] for depth in GRID["depths"]] == [1.0, 1.0, 1.0]
    assert [grid[600, depth] for depth in GRID["depths"]] == [0.0, 1.0, 1.0]


def test_a_prompt_that_is_too_short() -> None:
    with pytest.raises(hf_usp.UspError, match="choose longer --lengths"):
        needle.make_prompt(texts.ByteTokenizer(), "keys", 100, 0.5, 0)


@pytest.fixture
def model(tmp_path: Path) -> list[str]:
    """The flags of a random model."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**TINY_LLAMA, initializer_range=0.3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    return ["--model", str(tmp_path / "model"), "--tokenizer", "bytes"]


def test_two_questions_to_a_document(tmp_path: Path, model: list[str]) -> None:
    (tmp_path / "book.txt").write_text(needle.FILLER * 2)
    flags = [str(tmp_path / "book.txt"), *model, "--question", "Which sky?", "Who?", "--max_new_tokens", "9"]
    theirs = alone("scripts/ask.py", *flags)
    mine = several(2, "scripts/ask.py", *flags, "--ring_degree", "2")
    assert theirs.returncode == mine.returncode == 0, theirs.stdout + mine.stdout
    answers = [[line for line in x.stdout.splitlines() if " tokens. W" in line] for x in (mine, theirs)]
    assert answers[0] == answers[1] and len(answers[0]) == 2


def test_the_script(tmp_path: Path, model: list[str]) -> None:
    flags = [*model, "--ring_degree", "2", "--samples", "1"]
    flags += ["--lengths", "120", "200", "--depths", "0.5", "--output", str(tmp_path / "needle.png")]
    result = several(2, "scripts/needle.py", *flags)
    assert result.returncode == 0, result.stdout
    numbers = json.loads((tmp_path / "needle.json").read_text())
    assert [cell["length"] for cell in numbers["grid"]] == [120, 200] and (tmp_path / "needle.png").exists()


def trained(folder: str) -> list[dict[str, float]]:
    """Entries of the callback in the log of two steps of the stock Trainer."""
    fresh_accelerate()
    config = hf_usp.UspParallelismConfig(cp_size=2, generate="sharded")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY_LLAMA), attn_implementation="usp")
    args = training_arguments(folder, max_steps=2, per_device_train_batch_size=2, parallelism_config=config)
    trainer = Trainer(model=model, args=args, train_dataset=rows(8, 40))
    trainer.add_callback(needle.NeedleCallback(trainer, texts.ByteTokenizer(), 1, lengths=[120], depths=[0.5]))
    trainer.train()
    assert trainer.model.training
    return [entry for entry in trainer.state.log_history if "needle_120_0.5" in entry]


def test_the_callback(two_ranks: Ranks, tmp_path: Path) -> None:
    for logged in two_ranks.run(trained, str(tmp_path)):
        assert [entry["step"] for entry in logged] == [1, 2]
        assert all(0 <= entry["needle_120_0.5"] <= 1 for entry in logged)
