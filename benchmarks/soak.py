"""Hours in minutes: a tiny model trained for many short steps, and many Trainers in one process. Nothing may grow.

    python benchmarks/soak.py                 # 1,200 steps and 12 Trainers on 2 x 2 and in one process: 20 minutes
    python benchmarks/soak.py --steps 220     # 5 minutes

The stock Trainer, packed rows of 20 to 180 tokens, a sliding layer, two batches a step, evaluation and checkpoint every
20 steps, AdamW, gradient checkpointing, loss and MLPs in chunks. Predicted: losses of one process to 2e-6; files,
threads, groups, layouts and tensors alive at the end as at the second measurement.
Writes results/soak-<date>.md, .json and .png.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from datetime import date
from pathlib import Path
from typing import Any

import torch
from notes import machine_notes

ROOT = Path(__file__).resolve().parents[1]
EVERY = 20  # steps between two measurements
LAST = 3  # measurements at the end of which the least counts: a thread may hold a tensor for a moment
FLAT = ("files", "threads", "groups", "layouts", "tensors")


def packed_rows(count: int, seed: int) -> list[dict[str, list[int]]]:
    """Rows of documents of 1 to 60 tokens, position_ids from 0 in each."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        lengths, left = [], draw.randint(20, 180)
        while left:
            lengths.append(min(left, draw.randint(1, 60)))
            left -= lengths[-1]
        ids = [[draw.randint(3, 63) for _ in range(n)] for n in lengths]
        rows.append(
            {
                "input_ids": sum(ids, []),
                "labels": sum(([-100, *document[1:]] for document in ids), []),
                "position_ids": sum((list(range(n)) for n in lengths), []),
            }
        )
    return rows


def alive() -> dict[str, int]:
    """Of this process: resident kB, open files, threads, process groups, layouts and tensors that Python knows."""
    from torch.distributed import distributed_c10d

    from hf_usp.batch.layout import SequenceLayout

    gc.collect()
    kinds = [type(x) for x in gc.get_objects()]
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return {
        "rss": int(status.split("VmRSS:")[1].split()[0]),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "groups": len(distributed_c10d._world.pg_map),
        "layouts": sum(kind is SequenceLayout for kind in kinds),
        "tensors": sum(issubclass(kind, torch.Tensor) for kind in kinds),
    }


def trainer_of(way: str, folder: str, steps: int) -> Any:
    """The stock Trainer; the same weights and rows in each."""
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    import hf_usp

    config = AutoConfig.for_model(
        "qwen2",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=256,
        use_sliding_window=True,
        sliding_window=30,
        max_window_layers=1,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa" if way == "one" else "usp")
    mesh = None
    if way == "mesh":
        mesh = hf_usp.UspParallelismConfig(cp_size=4, ulysses_degree=2, loss_chunk_size=16, mlp_chunk_size=8)
    arguments = TrainingArguments(
        output_dir=folder,
        parallelism_config=mesh,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        max_steps=steps,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=EVERY,
        save_steps=EVERY,
        save_total_limit=2,
        learning_rate=1e-3,
        prediction_loss_only=True,
        seed=5,
    )

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[dict[str, float]] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % EVERY == EVERY // 2:
                self.seen.append({"step": state.global_step, **alive()})

    watch = Watch()
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=packed_rows(600, 0),
        eval_dataset=packed_rows(6, 1),
        callbacks=[watch],
    )
    return trainer, watch.seen


def run(way: str, steps: int, trainers: int, out: Path) -> None:
    """In a process of a run: one long training, then many short ones."""
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    trainer, seen = trainer_of(way, str(out / way), steps)
    trainer.train()
    logged = {
        name: [log[name] for log in trainer.state.log_history if name in log]
        for name in ("loss", "eval_loss", "grad_norm")
    }
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    again = []
    for _ in range(trainers):
        trainer = None
        trainer, _ = trainer_of(way, str(out / f"{way}-again"), 2)
        trainer.train()
        again.append(alive())
    (out / f"{way}-{rank}.json").write_text(
        json.dumps({"logged": logged, "seen": seen, "again": again}), encoding="utf-8"
    )
    torch.save(weights, out / f"{way}-{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def growth(seen: list[dict[str, int]], name: str) -> int:
    """From the second measurement to the end."""
    return min(x[name] for x in seen[-LAST:]) - seen[1][name]


def findings(one: dict[str, Any], ranks: list[dict[str, Any]], weights: list[torch.Tensor]) -> dict[str, Any]:
    """Differences to one process, and the growth from the second measurement to the last."""
    found: dict[str, Any] = {}
    for name, values in one["logged"].items():
        found[f"{name}, largest difference"] = max(
            abs(mine - theirs) for rank in ranks for mine, theirs in zip(rank["logged"][name], values, strict=True)
        )
    found["weights, largest difference"] = (weights[1] - weights[0]).abs().max().item()
    found["ranks whose weights are those of rank 0"] = sum(torch.equal(weights[1], w) for w in weights[1:])
    for part, text in (("seen", "steps"), ("again", "Trainers")):
        for name in (*FLAT, "rss"):
            unit = ", kB" if name == "rss" else ""
            found[f"{name} more, {text}{unit}"] = max(growth(rank[part], name) for rank in ranks)
            found[f"{name} more, {text}{unit}, one process"] = growth(one[part], name)
    return found


def failures(found: dict[str, Any], ranks: int) -> list[str]:
    """Findings that are not as predicted."""
    bad = [f"{name}: {x}" for name, x in found.items() if name.startswith(("loss", "eval_loss")) and x > 2e-6]
    if found["ranks whose weights are those of rank 0"] != ranks:
        bad.append("weights differ between ranks")
    for name in FLAT:
        for part in ("steps", "Trainers"):
            more, alone = found[f"{name} more, {part}"], found[f"{name} more, {part}, one process"]
            bad += [f"{name} grow over {part}: {more}, {alone} in one process"] if more > max(alone, 0) else []
    return bad


def draw(one: dict[str, Any], ranks: list[dict[str, Any]], path: Path) -> None:
    """Resident memory over steps, above that at the second measurement."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 3.5))
    for name, run in [("one process", one), *((f"rank {i} of 2 x 2", rank) for i, rank in enumerate(ranks))]:
        rss = [x["rss"] / 1024 for x in run["seen"]]
        axis.plot([x["step"] for x in run["seen"]], [x - rss[1] for x in rss], label=name)
    axis.set_xlabel("step")
    axis.set_ylabel("resident memory, MB more")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--trainers", type=int, default=12)
    parser.add_argument("--way", choices=("one", "mesh"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        run(args.way, args.steps, args.trainers, args.out)
        return 0
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for way, launcher in (("one", [sys.executable]), ("mesh", torchrun)):
            print(f"{way}: {args.steps} steps, then {args.trainers} Trainers", flush=True)
            flags = ["--way", way, "--out", folder, "--steps", str(args.steps), "--trainers", str(args.trainers)]
            subprocess.run([*launcher, __file__, *flags], check=True)
        one, *ranks = [
            json.loads((out / f"{name}.json").read_text()) for name in ("one-0", *(f"mesh-{i}" for i in range(4)))
        ]
        weights = [torch.load(out / f"{name}.pt") for name in ("one-0", *(f"mesh-{i}" for i in range(4)))]
    found = findings(one, ranks, weights)
    bad = failures(found, len(ranks))
    notes = machine_notes(f"python benchmarks/soak.py --steps {args.steps} --trainers {args.trainers}")
    lines = [
        "# Soak",
        "",
        *(f"- {name}: {text}" for name, text in notes.items()),
        "",
        "| figure | value |",
        "|---|---|",
    ]
    lines += [f"| {name} | {x:.3g} |" if isinstance(x, float) else f"| {name} | {x:,} |" for name, x in found.items()]
    lines += ["", "As predicted." if not bad else "Not as predicted: " + "; ".join(bad) + "."]
    print("\n".join(lines))
    base = ROOT / "results" / f"soak-{date.today()}"
    base.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    base.with_suffix(".json").write_text(json.dumps({"found": found, "one": one, "ranks": ranks}), encoding="utf-8")
    draw(one, ranks, base.with_suffix(".png"))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
