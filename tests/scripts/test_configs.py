"""Every Accelerate config loads, and the launch line in its head is one that can be typed."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from degrees import ContextParallelArguments
from finetune import ModelArguments, ReportArguments, TextArguments
from transformers import HfArgumentParser, TrainingArguments

from .launch import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def launch_line(config: Path) -> list[str]:
    """The words of the command in the comment at the head of a config."""
    head = [line.removeprefix("#") for line in config.read_text().splitlines() if line.startswith("#")]
    begin = next(i for i, line in enumerate(head) if line.strip().startswith("accelerate launch"))
    lines = head[begin : next((i for i in range(begin, len(head)) if not head[i].strip()), len(head))]
    return shlex.split(" ".join(line.strip().removesuffix("\\") for line in lines))


def test_the_four_ways_are_there() -> None:
    names = {config.stem for config in CONFIGS}
    assert names >= {"cpu_4_processes", "one_node_8_gpus_ddp", "one_node_8_gpus_fsdp2", "two_nodes_16_gpus_fsdp2"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_loads_and_its_launch_line_parses(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(config.read_text().splitlines()) <= 25
    loaded = load_config_from_file(str(config))
    words = launch_line(config)
    launch = launch_command_parser().parse_args(words[2:])
    assert launch.config_file == str(config.relative_to(ROOT))
    assert launch.training_script == "scripts/finetune.py"

    kinds: Any = (ContextParallelArguments, ModelArguments, TextArguments, ReportArguments, TrainingArguments)
    flags, unknown = HfArgumentParser(kinds).parse_known_args(launch.training_script_args)
    assert not unknown
    # The dataclasses check themselves; TrainingArguments would start process groups.
    monkeypatch.setenv("WORLD_SIZE", str(loaded.num_processes))
    for kind in (ContextParallelArguments, ModelArguments, TextArguments):
        kind(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(kind)})
    assert loaded.num_processes % flags.context_parallel_size == 0
    assert loaded.num_processes % loaded.num_machines == 0
    per_node = loaded.num_processes // loaded.num_machines
    assert per_node % flags.ulysses_degree_in_cp == 0, "heads are exchanged inside a node"
    if loaded.fsdp_config:
        assert loaded.fsdp_config["fsdp_version"] == 2
