"""The public surface: names, parameters, verbs of the command. A change here changes the version (CHANGELOG.md)."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
from transformers import TrainingArguments

import hf_usp
from hf_usp.config import OPTIONS as OPTION_NAMES
from hf_usp.tools.cli import main

ROOT = Path(__file__).parents[1]
# Name -> parameters that callers rely on. More may be added behind them, with defaults.
SURFACE = {
    "UspParallelismConfig": ["cp_size", "ulysses_degree"],
    "UspMesh.build": ["ring_degree", "ulysses_degree"],
    "UspMesh.from_device_mesh": ["mesh", "ulysses_degree", "cp_axis"],
    "shard": ["batch", "mesh", "order", "kernel"],
    "unshard": ["tensor", "layout", "dim"],
    "usp_attention": ["q", "k", "v", "layout", "scaling", "sliding_window", "softcap", "sinks", "causal"],
    "shard_recurrent_layers": ["model"],
}
OPTIONS = [
    "dp_replicate_size",
    "dp_shard_size",
    "tp_size",
    "sequence_order",
    "gather_outputs",
    "loss_chunk_size",
    "kernel",
    "self_check",
    "generate",
    "ranks_per_node",
]
ERRORS = {
    "UspBatchError",
    "UspConfigError",
    "UspError",
    "UspKernelError",
    "UspMaskError",
    "UspModelError",
    "UspRankError",
}


def parameters(name: str) -> list[inspect.Parameter]:
    thing = hf_usp
    for part in name.split("."):
        thing = getattr(thing, part)
    return [p for p in inspect.signature(thing).parameters.values() if p.name != "self"]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SURFACE)
def test_parameters_keep_their_order_and_new_ones_have_defaults(name: str) -> None:
    found = parameters(name)
    known = SURFACE[name]
    assert [p.name for p in found[: len(known)]] == known
    optional = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    assert all(p.default is not p.empty or p.kind in optional for p in found[len(known) :])


def test_names_stay() -> None:
    assert set(hf_usp.__all__) >= {name.split(".")[0] for name in SURFACE} | ERRORS | {"SequenceLayout", "UspMesh"}
    assert set(OPTIONS) <= {p.name for p in parameters("UspParallelismConfig")}
    for error in ERRORS:
        assert issubclass(getattr(hf_usp, error), ValueError)


@pytest.mark.parametrize("verb", ["plan", "check", "explain"])
def test_verbs_stay(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0 and "--output" in capsys.readouterr().out or verb == "plan"


def test_one_version_everywhere() -> None:
    declared = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert declared is not None and declared[1] == hf_usp.__version__
    assert f"## {hf_usp.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_option_is_shown_and_written(tmp_path: Path) -> None:
    sizes = {"dp_replicate_size", "dp_shard_size", "cp_size", "tp_size"}
    assert {p.name for p in parameters("UspParallelismConfig")} == {*OPTION_NAMES, *sizes, "kwargs"}
    options = {
        "ulysses_degree": 2,
        "sequence_order": "zigzag",
        "loss_chunk_size": 64,
        "mlp_chunk_size": 32,
        "offload_checkpoints": True,
        "kernel": "eager",
        "self_check": False,
        "ranks_per_node": 2,
        "machine": "cpu",
        "sequence_length": 4096,
    }
    config = hf_usp.UspParallelismConfig(cp_size=4, **options)
    for name, value in options.items():
        assert f"{name}={value!r}" in repr(config)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, parallelism_config=config)
    written = json.loads(arguments.to_json_string())["parallelism_config"]
    assert options.items() <= written.items() and written["cp_size"] == 4
    assert vars(hf_usp.UspParallelismConfig(**written)) == vars(config), "what is written makes the same config again"
    again = eval(repr(config), vars(hf_usp))
    assert vars(again) == vars(config) and again.fill_data_parallel


@pytest.mark.parametrize("old", ["loss_chunk", "mlp_chunk"])
def test_old_names_of_options_still_work(old: str) -> None:
    with pytest.warns(FutureWarning, match=f"{old}_size"):
        config = hf_usp.UspParallelismConfig(**{old: 64})
    assert getattr(config, f"{old}_size") == 64
