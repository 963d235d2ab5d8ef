"""One sequence of 262,144 tokens on 4 CPU processes, in less memory than the same sequence needs in one. make book

    python scripts/book.py          (262,144 tokens; half an hour on 2 cores, losses 5.7, 4.5)

Every process limits its own address space (RLIMIT_AS, as `ulimit -v` does) once model and data are there: to what it
has by then, plus --limit-mb for training. Three runs of the same two-layer Llama (full causal attention, width 384,
bytes as tokens, YaRN positions) on the Python documentation, by the stock Trainer: plain Transformers in one process,
one process with all that saves memory there (checkpointed layers, attention kept, MLPs and loss in chunks), and 4
processes, ulysses 2 x ring 2, with layers in chunks as well. The first two must end with "can't allocate memory", the
last must train. The limit is the peak of 131,072 tokens before layers ran in chunks (results/book-2026-11-25.md).
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RANKS = 4
SAVING: dict[str, Any] = {"mlp_chunk_size": 2048, "loss_chunk_size": 2048}
OPTIONS: dict[str, Any] = {"plain": {}, "alone": SAVING, "mesh": SAVING | {"layer_chunk_size": 2048}}
PRETRAINED = 8192  # tokens of the rows that such a model would have been pretrained on
WAYS = {"plain": "one process, plain Transformers", "alone": "one process, all savings", "mesh": "4 processes, 2 x 2"}


def used_mb(name: str) -> float:
    """A line of this process's status: VmPeak (address space, what `ulimit -v` limits) or VmHWM (resident)."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) / 1024


def train(way: str, tokens: int, steps: int, limit_mb: int, folder: Path) -> None:
    """One process of one run; writes its losses and its peak."""
    import torch
    from texts import full_rows
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    import hf_usp

    torch.manual_seed(0)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    parallelism = hf_usp.UspParallelismConfig(cp_size=world, ulysses_degree=min(2, world), **OPTIONS[way])
    saving: dict[str, Any] = {
        "parallelism_config": parallelism,
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": hf_usp.save_attention_outputs(),
    }
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=4e-3,
        use_cpu=True,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        **({} if way == "plain" else saving),
    )
    rows = full_rows(list(pydoc_data.topics.topics.values()), tokens)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=tokens,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": tokens / PRETRAINED,
            "original_max_position_embeddings": PRETRAINED,
        },
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa" if way == "plain" else "usp")
    trainer = Trainer(model=model, args=args, train_dataset=rows)
    # From here on: what training itself may take.
    limit = int((used_mb("VmSize") + limit_mb) * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    size, before, started = used_mb("VmSize"), used_mb("VmRSS"), time.monotonic()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = {
        "losses": losses,
        "resident_mb": used_mb("VmHWM") - before,
        "address_mb": used_mb("VmPeak") - size,
        "seconds": time.monotonic() - started,
    }
    (folder / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))


def run(way: str, args: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Start a run; its losses and the largest peak of its processes, or why it ended."""
    folder = output / way
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("rank*.json"):
        old.unlink()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)] if way == "mesh" else []
    flags = [f"--tokens={args.tokens}", f"--steps={args.steps}", f"--limit-mb={args.limit_mb}", f"--output={output}"]
    ranks = RANKS if way == "mesh" else 1
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, *launcher, __file__, "--way", way, *flags]
    print(f"== {WAYS[way]}", flush=True)
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("rank*.json"))]
    if ended.returncode == 0 and len(found) == ranks:
        peaks = {name: max(f[name] for f in found) for name in ("resident_mb", "address_mb")}
        return {"losses": found[0]["losses"], **peaks, "seconds": found[0]["seconds"]}
    refused = re.findall(
        r"can't allocate memory: you tried to allocate (\d+) bytes|(MemoryError|bad_alloc)", ended.stderr
    )
    if not refused:
        sys.exit(ended.stdout + ended.stderr)
    return {"ended": "can't allocate memory", "asked_mb": int(refused[0][0] or 0) / 2**20}


def report(results: dict[str, Any], args: argparse.Namespace) -> str:
    """Markdown: one row a run."""
    lines = [
        f"One sequence of {args.tokens:,} tokens, {args.limit_mb:,} MB for training in every process.",
        "",
        "| run | outcome | loss by step | peak for training, MB per process: address space | resident | s |",
        "| --- " * 6 + "|",
    ]
    for way, title in WAYS.items():
        r = results[way]
        if "ended" in r:
            lines.append(f"| {title} | {r['ended']} (a further {r['asked_mb']:.0f} MB) | | | | |")
            continue
        peaks = f"{r['address_mb']:.0f} | {r['resident_mb']:.0f}"
        losses = ", ".join(f"{loss:.3f}" for loss in r["losses"])
        lines.append(f"| {title} | trained | {losses} | {peaks} | {r['seconds']:.0f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=262144)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--limit-mb", type=int, default=865, help="memory of a process for training")
    parser.add_argument("--output", type=Path, default=Path("runs/book"))
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        train(args.way, args.tokens, args.steps, args.limit_mb, args.output / args.way)
        return 0
    from importlib.metadata import version

    results = {way: run(way, args, args.output) for way in WAYS}
    text = report(results, args)
    print(text)
    about = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    numbers = {**vars(args), "output": str(args.output), "cores": os.cpu_count(), **about, "runs": results}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "book.json").write_text(json.dumps(numbers, indent=1) + "\n")
    (args.output / "book.md").write_text(text + "\n")
    mesh = results["mesh"].get("losses", [])
    return 0 if "ended" in results["plain"] and "ended" in results["alone"] and mesh and mesh[-1] < mesh[0] else 1


if __name__ == "__main__":
    sys.exit(main())
