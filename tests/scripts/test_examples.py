"""The hand-written loops and TRL's examples: on a mesh they print the losses of one process."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from .launch import TINY_LLAMA, alone, several, start, succeeded


def losses(printed: str) -> list[float]:
    found = [float(x) for x in re.findall(r"^step \d+ loss (\S+)$", printed, flags=re.MULTILINE)]
    assert len(found) == 5, printed
    return found


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"{i * i % 97}." for i in range(900)))
    return str(file)


@pytest.mark.timeout(240)
def test_both_loops_equal_one_process(text: str) -> None:
    length = ["--sequence_length", "301"]
    one = losses(succeeded(alone("scripts/train_plain.py", text, *length)))
    assert one[-1] < one[0] - 0.5
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2 scripts/train_plain.py"  # as a user starts it
    assert losses(succeeded(start(torchrun, text, *length, "--ring_degree", "2"))) == pytest.approx(one, abs=2e-5)

    script = "scripts/train_accelerate.py"
    assert losses(succeeded(alone(script, text, *length))) == pytest.approx(one, abs=2e-5)
    printed = succeeded(several(4, script, text, *length, "--cp_size", "4", "--ulysses_degree", "2"))
    assert losses(printed) == pytest.approx(one, abs=2e-5)


@pytest.mark.timeout(240)  # four runs that import TRL
@pytest.mark.parametrize("trainer", ["dpo", "grpo"])
def test_examples_of_trl_equal_one_process(text: str, trainer: str) -> None:
    def logged(printed: str) -> list[float]:
        found = re.findall(r"^step \d+ loss (\S+) (?:reward|margin) (\S+)$", printed, flags=re.MULTILINE)
        assert len(found) == 3, printed
        return [float(x) for numbers in found for x in numbers]

    script, flags = f"scripts/train_{trainer}.py", [text, "--prompt_length", "121", "--steps", "3"]
    one = logged(succeeded(alone(script, *flags)))
    mesh = logged(succeeded(several(4, script, *flags, "--cp_size", "4", "--ulysses_degree", "2")))
    assert mesh == pytest.approx(one, abs=2e-5)


@pytest.mark.timeout(120)
def test_perplexity_is_that_of_one_process(text: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY_LLAMA)).save_pretrained(tmp_path / "model")
    flags = [text, "--model", str(tmp_path / "model"), "--tokenizer", "bytes", "--tokens", "331"]
    succeeded(alone("scripts/perplexity.py", *flags, "--output", str(tmp_path / "one.png")))
    mesh = ["--ring_degree", "2", "--ulysses_degree", "2", "--output", str(tmp_path / "four.png")]
    assert "330 tokens predicted" in succeeded(several(4, "scripts/perplexity.py", *flags, *mesh))
    one, four = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "four"))
    assert four["loss"] == pytest.approx(one["loss"], abs=1e-6)
    for mine, theirs in zip(four["loss_by_position"], one["loss_by_position"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    assert (tmp_path / "four.png").read_bytes().startswith(b"\x89PNG")
