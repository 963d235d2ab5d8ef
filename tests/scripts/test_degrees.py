"""The flags --context-parallel-size, --context-parallel-algo and --ulysses-degree-in-cp."""

from __future__ import annotations

from typing import Any

import pytest
from degrees import ContextParallelArguments
from transformers import HfArgumentParser

from hf_usp import UspConfigError

DEGREES = [
    ("--context-parallel-size 8", 8, 1),
    ("--context-parallel-size 8 --context-parallel-algo ulysses_cp_algo", 8, 1),
    ("--context_parallel_size 8 --context_parallel_algo megatron_cp_algo", 1, 8),
    ("--context-parallel-size 8 --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2", 2, 4),
    ("--context_parallel_size 4 --context_parallel_algo hybrid_cp_algo --ulysses_degree_in_cp 4", 4, 1),
]
REFUSED = [
    ("--context-parallel-size 8 --context-parallel-algo double_ring", "one of ulysses_cp_algo, megatron_cp_algo"),
    ("--context-parallel-size 8 --context-parallel-algo hybrid_cp_algo", "without --ulysses-degree-in-cp"),
    ("--context-parallel-size 8 --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 3", "1, 2, 4, 8"),
    ("--context-parallel-size 8 --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 0", "1, 2, 4, 8"),
    ("--context-parallel-size 8 --ulysses-degree-in-cp 4", "which means 8"),
    ("--context-parallel-size 3", "with 8 processes.*1, 2, 4, 8"),
    ("--context-parallel-size 16", "with 8 processes"),
    ("--context-parallel-size 0", "with 8 processes"),
    ("--context-parallel-size 4 --tensor-model-parallel-size 4", "--tensor-model-parallel-size 4 x"),
    ("--tensor-model-parallel-size 0", "--tensor-model-parallel-size 0 x"),
]


def parse(flags: str) -> ContextParallelArguments:
    kinds: Any = ContextParallelArguments
    (arguments,) = HfArgumentParser(kinds).parse_args_into_dataclasses(flags.split(), look_for_args_file=False)
    return arguments


@pytest.mark.parametrize(("flags", "ulysses", "ring"), DEGREES)
def test_flags_mean_degrees(flags: str, ulysses: int, ring: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    config = parse(flags).parallelism_config()
    assert config is not None
    assert (config.ulysses_degree, config.ring_degree, config.cp_size) == (ulysses, ring, ulysses * ring)


@pytest.mark.parametrize(("flags", "message"), REFUSED)
def test_refused_when_parsed(flags: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UspConfigError, match=message):
        parse(flags)


def test_one_process_per_sequence_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert parse("").parallelism_config() is None
    config = parse("--loss-chunk-size 512").parallelism_config()
    assert config is not None
    assert (config.cp_size, config.loss_chunk_size) == (1, 512)


def test_layers_are_split_inside_and_weights_sharded_over_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    split = parse("--context-parallel-size 4 --tensor-model-parallel-size 2").distributed_config()
    assert split is not None and (split.tp_size, split.fsdp_size) == (2, 4)
    assert parse("--context-parallel-size 4").distributed_config() is None


def test_the_log_says_how_heads_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    arguments = parse("--context-parallel-size 4 --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2")
    assert "ulysses 2 x ring 2; 9 query and 3 kv heads, split unevenly: 5 + 4" in arguments.describe(9, 3)
    assert "split evenly: 4 + 4" in arguments.describe(8, 1)
