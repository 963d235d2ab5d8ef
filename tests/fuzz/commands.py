"""Random command lines of `hf-usp`, and files and environments that they read."""

from __future__ import annotations

import functools
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_usp.tools.cli import main

from .driver import Act

NUMBERS = (
    "0",
    "1",
    "2",
    "3",
    "7",
    "8",
    "16",
    "64",
    "100",
    "127",
    "1000",
    "4096",
    "65536",
    "131072",
    "1000000",
    "2147483648",
    "1" + "0" * 18,
    "1" + "0" * 30,
    "-1",
    "-8",
    "1.5",
    "1e5",
    "nan",
    "inf",
    "",
    " 8 ",
    "0x10",
    "8_000",
    "9" * 5000,
)
SMALL = ("1", "2", "3", "4", "5", "6", "8", "12", "16", "24", "32")
# A config.json: its text, or what differs from a small Llama.
TEXTS = (
    "",
    "{",
    "[]",
    "null",
    "3",
    '"x"',
    "{}",
    "[" * 100_000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    "\x00\x01",
    '{"hidden_size": 8}',
    '{"model_type": "nope"}',
    '{"model_type": 3}',
    '{"model_type": ["llama"]}',
)
TYPES = (
    "bert",
    "t5",
    "mamba",
    "clip",
    "whisper",
    "vit",
    "gpt_oss",
    "qwen3",
    "qwen3_moe",
    "mistral",
    "mixtral",
    "gemma3",
)
FIELDS = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "vocab_size",
    "head_dim",
    "intermediate_size",
    "sliding_window",
    "layer_types",
    "num_local_experts",
    "num_experts_per_tok",
    "dtype",
    "tie_word_embeddings",
    "rope_parameters",
    "text_config",
    "quantization_config",
    "auto_map",
    "_attn_implementation",
)
VALUES: tuple[Any, ...] = (
    0,
    -4,
    1,
    7,
    32,
    True,
    None,
    "4096",
    "x",
    4096.0,
    float("nan"),
    float("inf"),
    10**12,
    10**400,
    [],
    [1, 2, None],
    {},
    "evil",
    {"AutoConfig": "evil.EvilConfig"},
    {"quant_method": "bitsandbytes"},
    {"hidden_size": "x"},
    "\x1b[31m",
)
RATES: tuple[Any, ...] = (0, -1, "x", "3", None, 1e12, 1e400, float("nan"), True, [], 1)
LINES = (
    "",
    "{}",
    '{"input_ids": []}',
    '{"input_ids": 3}',
    '{"input_ids": "abc"}',
    "[" * 100_000,
    "\x00",
    "[1]",
    '{"input_ids": [1,2,3], "position_ids": [0,1]}',
    '{"input_ids": [1,2,3], "position_ids": "abc"}',
    '{"input_ids": {"a":1,"b":2}}',
    '{"input_ids": [1,2,3], "position_ids": [0,null,2]}',
    '{"input_ids": null}',
    '{"input_ids": [1,2,3], "position_ids": [0,1,0]}\n' * 3,
    '{"input_ids": [1,2,3], "position_ids": [[0,1,2]]}',
    "\n\n{}",
    '{"text": "hello"}',
    '{"input_ids": [1,2,3], "position_ids": {"1": 2}}',
)


def number(r: random.Random, small: float = 0.6) -> str:
    return r.choice(SMALL) if r.random() < small else r.choice(NUMBERS)


def lengths(r: random.Random) -> str:
    return ",".join(number(r, 0.8) for _ in range(r.randint(1, 6))) if r.random() < 0.9 else r.choice([",", "1;2", "a"])


def result(r: random.Random, folder: Path) -> str:
    names = ("o.html", "o.png", "x.txt", "", ".", "/dev/full", "é\n.html", "no/such/x.html", "\udcff.html", "x" * 300)
    name = r.choice(names)
    return name if name.startswith("/") or not name else str(folder / name)


def written(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def model(r: random.Random, folder: Path) -> str:
    if r.random() < 0.1:
        return r.choice(["", ".", "/", "no/such", "x" * 5000, "\udcff", "/dev/null", "a--b", "https://x/y", "\n"])
    if r.random() < 0.15:
        text = r.choice(TEXTS)
    else:
        config: dict[str, Any] = {"model_type": "llama" if r.random() < 0.7 else r.choice(TYPES)}
        for name in r.sample(FIELDS, r.choice([0, 1, 1, 1, 2])):
            config[name] = r.choice(VALUES)
        # Layers that Transformers lists one by one; 10^12 of them fill the memory of the machine.
        if config.get("num_hidden_layers") in (10**12, 10**400):
            del config["num_hidden_layers"]
        text = dumps(config)
    evil = "open('ran', 'w').write('x')\nfrom transformers import PreTrainedConfig as EvilConfig\n"
    written(folder, "model/evil.py", evil)
    return os.path.dirname(written(folder, "model/config.json", text))


def dumps(content: Any) -> str:
    """As JSON; whole numbers of more digits than Python writes by itself, too."""
    return json.dumps(content)


def machine(r: random.Random, folder: Path) -> str:
    if r.random() < 0.5:
        return r.choice(["h100-nvlink", "cpu", "4090-pcie", "", "nope", "x.json"])
    link = {"ranks": 8, "bandwidth": 1e9, "latency": 1e-4}
    content: dict[str, Any] = {"name": "cpu", "matmul_flops": 1e12, "memory": 1e11, "memory_bandwidth": 1e10}
    for place in (link, content):
        if r.random() < 0.5:
            place[r.choice(list(place))] = r.choice(RATES)
    content["links"] = [link] * r.choice([1, 1, 1, 0, 2])
    return written(
        folder,
        "m.json",
        r.choice(["{}", "[]", "{", "[" * 100_000]) if r.random() < 0.1 else dumps({"machine": content}),
    )


def fuzz_plan(folder: Path, r: random.Random) -> tuple[Act, Any]:
    tokens = number(r, 0.4) if r.random() < 0.3 else r.choice(["4096", "131072"])
    given = ["plan", "--model", model(r, folder), "--tokens", tokens, "--gpus", number(r, 0.85)]
    makers: dict[str, tuple[float, Callable[[], str]]] = {
        "--machine": (0.4, lambda: machine(r, folder)),
        "--gpus-per-node": (0.2, lambda: number(r)),
        "--memory": (0.3, lambda: number(r)),
        "--rows": (0.2, lambda: number(r)),
        "--documents": (0.2, lambda: lengths(r)),
        "--tp": (0.2, lambda: number(r)),
        "--mlp-chunk-size": (0.2, lambda: number(r)),
        "--config": (0.1, lambda: result(r, folder)),
    }
    return command(r, given, makers, ("--offload", "--accumulate", "--json"))


def fuzz_explain(folder: Path, r: random.Random) -> tuple[Act, Any]:
    given = ["explain", "--ranks", number(r, 0.85), "--heads", number(r, 0.8)]
    makers: dict[str, tuple[float, Callable[[], str]]] = {
        "--tokens": (0.8, lambda: number(r)),
        "--kv-heads": (0.5, lambda: number(r)),
        "--head-dim": (0.3, lambda: number(r)),
        "--ulysses": (0.4, lambda: number(r)),
        "--ranks-per-node": (0.2, lambda: number(r)),
        "--window": (0.3, lambda: number(r)),
        "--chunk": (0.3, lambda: number(r)),
        "--batch": (0.2, lambda: number(r)),
        "--documents": (0.3, lambda: lengths(r)),
        "--order": (0.3, lambda: r.choice(["auto", "zigzag", "spiral", ""])),
        "--dtype": (0.2, lambda: r.choice(["bf16", "fp64", "fp8", ""])),
        "--dataset": (0.15, lambda: written(folder, "d.jsonl", r.choice(LINES))),
        "--output": (0.1, lambda: result(r, folder)),
    }
    return command(r, given, makers, ("--bidirectional",))


def fuzz_check(folder: Path, r: random.Random) -> tuple[Act, Any]:
    """One process, most of them with an environment or an option that is wrong."""
    environment = {
        name: r.choice(values)
        for name, values in {
            "RANK": ("x", "5", "-1", ""),
            "WORLD_SIZE": ("x", "0", "-2", "1" * 40),
            "LOCAL_RANK": ("x",),
            "MASTER_PORT": ("x", "99999", "-1", ""),
        }.items()
        if r.random() < 0.3
    }
    given = "check --dtype fp32 --heads 4 --kv-heads 2 --head-dim 16 --message 4096 --timeout 20".split()
    makers: dict[str, tuple[float, Callable[[], str]]] = {
        "--model": (0.3, lambda: model(r, folder)),
        "--output": (0.1, lambda: result(r, folder)),
        "--timeout": (0.15, lambda: r.choice(["nan", "inf", "1e30", "0", "x"])),
        "--heads": (0.2, lambda: number(r, 0.5)),
        "--kv-heads": (0.2, lambda: number(r)),
        "--message": (0.2, lambda: r.choice(["0", "-1", "1" + "0" * 15, "x", "8"])),
        "--cp-size": (0.1, lambda: number(r)),
        "--ranks-per-node": (0.1, lambda: number(r)),
    }
    act, what = command(r, given, makers, ())

    def inside() -> Any:
        os.environ.update(environment)
        return act()

    return inside, (environment, what)


def command(
    r: random.Random, given: list[str], makers: dict[str, tuple[float, Callable[[], str]]], switches: tuple[str, ...]
) -> tuple[Act, Any]:
    for name, (often, make) in makers.items():
        if r.random() < often:
            given += [name, make()]
    given += [name for name in switches if r.random() < 0.2]
    return functools.partial(main, given), [text[:80] for text in given]
