"""Whatever a user types, or a file of theirs holds, ends in a refusal that says what to change; no code is run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

import hf_usp
from hf_usp.planner.request import find_machine, read_config, read_model
from hf_usp.tools.check import CheckOptions
from hf_usp.tools.check.run import run
from hf_usp.tools.cli import main

LLAMA = {"model_type": "llama"}
# Differences from a Llama, or the text of a config.json.
CONFIGS: dict[str, Any] = {
    "a fraction": {"hidden_size": 4096.0},
    "text": {"num_attention_heads": "32"},
    "no multiple": {"hidden_size": 7},
    "no heads": {"num_attention_heads": 0},
    "dtype": {"dtype": "evil"},
    "null": "null",
    "deep": "[" * 100_000,
    "no kv heads": {"num_key_value_heads": 0},
    "no width": {"head_dim": 0},
    "huge": '{"model_type": "llama", "vocab_size": 1' + "0" * 400 + "}",
    "an encoder": {"model_type": "bert"},
    "two sequences": {"model_type": "t5"},
    "sound": {"model_type": "whisper"},
    "pictures": {"model_type": "clip"},
    "fewer than no experts": {"num_local_experts": -8},
    "text config": {"model_type": "gemma3", "text_config": 3},
    "its own code": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}},
}
MACHINE = {
    "name": "cpu",
    "matmul_flops": 1e12,
    "memory": 1e11,
    "memory_bandwidth": 1e10,
    "links": [{"ranks": 2, "bandwidth": 1e9, "latency": 1e-4}],
}
MACHINES: tuple[dict[str, Any], ...] = (
    {"matmul_flops": 0},
    {"memory": float("nan")},
    {"memory_bandwidth": "1e9"},
    {"memory": 1e400},
    {"links": []},
    *({"links": [{**MACHINE["links"][0], **bad}]} for bad in ({"ranks": 0}, {"ranks": -2}, {"bandwidth": 0})),  # type: ignore[dict-item]
    {"links": MACHINE["links"] * 2},
)
ENVIRONMENTS = (
    {"RANK": "x"},
    {"RANK": "5"},
    {"WORLD_SIZE": "0"},
    {"WORLD_SIZE": "9" * 5000},
    {"MASTER_PORT": "99999"},
    {"MASTER_ADDR": "no.such.host.invalid", "RANK": "1", "WORLD_SIZE": "2"},
)


def written(folder: Path, content: Any) -> str:
    folder.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps({**LLAMA, **content})
    (folder / "config.json").write_text(text)
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass EvilConfig: pass\n")
    return str(folder)


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_are_none(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    with pytest.raises(hf_usp.UspConfigError, match=r"Rule: .+ Remedy: .+"):
        read_model(written(tmp_path / "model", CONFIGS[case]))
    assert not (tmp_path / "model" / "ran").exists()


def test_a_model_with_code_of_its_own_is_told(tmp_path: Path) -> None:
    with pytest.raises(hf_usp.UspConfigError, match=r"code of its own \(auto_map.*not run.*Remedy: pass a config.json"):
        read_config(written(tmp_path / "model", CONFIGS["its own code"]))


@pytest.mark.parametrize("bad", MACHINES, ids=str)
def test_machines_that_are_none(bad: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(json.dumps({"machine": {**MACHINE, **bad}}))
    with pytest.raises(hf_usp.UspConfigError, match="no measured machine.*hf-usp check --output check.json"):
        find_machine(str(tmp_path / "m.json"))
    (tmp_path / "m.json").write_text(json.dumps({"machine": MACHINE}))
    assert find_machine(str(tmp_path / "m.json")).memory == 1e11


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda e: " ".join(e))
def test_environments_that_fit_nothing(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(hf_usp.UspConfigError, match=r"Remedy: (unset|start the ranks with torchrun)"):
        run(CheckOptions(timeout=2))


def test_the_launch_line_is_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, config = str(tmp_path / "a model; touch ran #"), str(tmp_path / "q; ran.yaml")
    written(Path(model), {})
    assert main(["plan", "--model", model, "--tokens", "4096", "--gpus", "8", "--config", config]) == 0
    head = [line.strip("#\\ ") for line in Path(config).read_text().splitlines() if line.startswith("#")]
    words = shlex.split(" ".join(head))
    assert config in words and model in words
    written(tmp_path / "two\nlines", {})
    assert main(["plan", "--model", str(tmp_path / "two\nlines"), "--tokens", "4096", "--gpus", "8"]) == 2
    assert "rename the folder" in capsys.readouterr().err
