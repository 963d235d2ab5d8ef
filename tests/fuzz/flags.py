"""Random flags of `scripts/finetune.py`, each run in a process of its own: one step of a tiny model, or a refusal."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

from ..scripts.launch import alone
from .driver import Act

TINY = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}
# Files that stand in the folder of a run.
FILES: dict[str, str] = {
    "model.json": json.dumps(TINY),
    "small.json": json.dumps({**TINY, "vocab_size": 100}),
    "broken.json": "{",
    "float.json": '{"model_type": "llama", "hidden_size": 24.0}',
    "a.txt": "hello world " * 40,
    "empty.txt": "",
    "one.txt": "a",
    "file": "x",
    "checkpoint-3/trainer_state.json": '{"global_step": 3',
    "texts/t.txt": "inside " * 60,
}
# Flag -> values; those with a dot or a slash are files of that folder, if they are there.
VALUES: dict[str, tuple[str, ...]] = {
    "--config_name": ("model.json", "small.json", "broken.json", "float.json", "no.json", "", "texts"),
    "--model_name_or_path": ("no/such", "texts", "model.json"),
    "--tokenizer_name": ("bytes", "no/such", "texts", ""),
    "--dtype": ("float32", "bfloat16", "auto", "float8", ""),
    "--train_file": ("a.txt", "texts", "empty.txt", "one.txt", "no.txt", "", "["),
    "--eval_file": ("a.txt", "no.txt", "one.txt"),
    "--sequence_length": ("16", "64", "0", "1", "-5", "100000", "x"),
    "--cache_dir": ("cache", "/proc/x", "file", "né cache"),
    "--output_dir": ("/proc/nope", "file", "o2"),
    "--context-parallel-size": ("1", "2", "0", "-1", "x"),
    "--context-parallel-algo": ("ulysses_cp_algo", "hybrid_cp_algo", "foo"),
    "--ulysses-degree-in-cp": ("1", "2", "0", "x"),
    "--tensor-model-parallel-size": ("1", "2", "0", "-1"),
    "--loss-chunk-size": ("8", "0", "-1", "x"),
    "--mlp-chunk-size": ("8", "0", "-1"),
    "--profile_step": ("1", "0", "-1"),
    "--peak_tflops": ("1", "0", "nan"),
    "--resume_from_checkpoint": ("last", "checkpoint-3", "no"),
}


def fuzz_finetune(folder: Path, r: random.Random) -> tuple[Act, Any]:
    flags = {
        "--config_name": "model.json",
        "--train_file": "a.txt",
        "--sequence_length": "32",
        "--max_steps": "1",
        "--output_dir": "out",
        "--report_to": "none",
        "--use_cpu": "true",
        "--cache_dir": "cache",
        "--per_device_train_batch_size": "1",
        "--disable_tqdm": "true",
        "--save_strategy": "no",
    }
    for name in r.sample(list(VALUES), r.randint(1, 3)):
        flags[name] = r.choice(VALUES[name])
    if "--model_name_or_path" in flags:
        del flags["--config_name"]
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    made = {"out", "cache", "o2", "né cache", *FILES, *(str(Path(name).parent) for name in FILES)} - {"."}
    given = [text for name, value in flags.items() for text in (name, str(folder / value) if value in made else value)]

    def act() -> int:
        # In a process of the fork server: one forked from here would inherit locks of threads (Arrow's, say).
        ended = alone("scripts/finetune.py", *given, timeout=60)
        if ended.returncode and not (ended.returncode == 2 or re.search(r"^[\w.]+: usp: ", ended.stdout, re.M)):
            raise RuntimeError(ended.stdout[-1000:])
        return 2 if ended.returncode else 0

    return act, flags
