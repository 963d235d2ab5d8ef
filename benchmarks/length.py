"""Memory of a rank against the length of the sequence: flat when the ranks grow with it. 1, 2 and 4 processes.

    python benchmarks/length.py            (8,192 tokens a rank, up to 32,768; 17 minutes on 2 busy cores)

One training step of a small Llama, prepared by Accelerate: loss and MLPs in chunks, checkpointed layers; beside it
plain Transformers in one process at the same lengths. Two figures of the busiest rank: live bytes, the largest sum of
tensors alive at once of those that the step makes (weights and their gradients are there before), and RSS, the largest
resident set during the step over what the process had before. Two short steps come first, so that what a process sets
up once is there. The prediction of live bytes is the planner's (`hf_usp.planner.memory_model`). Exits with 1 where live
bytes of a mesh are over --flat times those of one rank. Writes results/length-<date>.md, .json and .png.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

CHUNK = 1024
SIZES: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
# processes, ulysses degree
MESHES = [(1, 1), (2, 2), (2, 1), (4, 2), (4, 1)]


# --- in a process of a run --------------------------------------------------------------------------------------------


def resident(name: str) -> int:
    """Bytes of a line of this process's status: VmRSS (now) or VmHWM (the most so far)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) * 1024


def measure(way: str, ulysses: int, tokens: int) -> dict[str, Any]:
    """Live bytes, RSS and loss of one step of this rank."""
    import torch
    from accelerate import Accelerator
    from counting import Peak
    from transformers import LlamaConfig, LlamaForCausalLM

    import hf_usp

    world = int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, max_position_embeddings=tokens, use_cache=False)
    model: Any = LlamaForCausalLM._from_config(config, attn_implementation="sdpa" if way == "plain" else "usp").train()
    if way == "usp":
        mesh = hf_usp.UspParallelismConfig(
            cp_size=world, ulysses_degree=ulysses, loss_chunk_size=CHUNK, mlp_chunk_size=CHUNK
        )
        # Renamed in Transformers 5.2x.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model = Accelerator(cpu=True, parallelism_config=mesh).prepare(model)

    def step(length: int) -> float:
        ids = torch.randint(0, SIZES["vocab_size"], (1, length), generator=torch.Generator().manual_seed(0))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        for p in model.parameters():
            p.grad.zero_()
        return loss.item()

    for _ in range(2):
        step(256)  # gradients exist, the buckets of DDP are what they stay
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the most so far is what there is now
    with Peak(x for p in model.parameters() for x in (p, p.grad)) as memory:
        loss = step(tokens)
    return {"live": memory.peak, "rss": resident("VmHWM") - before, "loss": loss}


# --- outside ----------------------------------------------------------------------------------------------------------


def predicted(processes: int, ulysses: int, tokens: int) -> float:
    """Bytes that the step makes on a rank, as the planner counts them; gradients are there already."""
    from hf_usp.planner.memory_model import memory
    from hf_usp.planner.workload import Degrees, ModelShape, TrainingStep

    shape = ModelShape(
        layers=SIZES["num_hidden_layers"],
        hidden=SIZES["hidden_size"],
        intermediate=SIZES["intermediate_size"],
        heads=SIZES["num_attention_heads"],
        kv_heads=SIZES["num_key_value_heads"],
        head_dim=SIZES["head_dim"],
        vocab=SIZES["vocab_size"],
    )
    job = TrainingStep(
        tokens=tokens,
        element=4,
        optimizer=0,
        checkpointing=True,
        loss_chunk_size=CHUNK,
        mlp_chunk_size=CHUNK,
        shard_params=False,
        accumulate=True,
    )
    parts = memory(shape, Degrees(ulysses=ulysses, ring=processes // ulysses), job)
    return parts.total - parts.weights - shape.params * job.element


def run_case(way: str, processes: int, ulysses: int, tokens: int) -> dict[str, Any]:
    """Start the processes of one run; the largest figures of their ranks, or how they failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--way", way, "--ulysses", str(ulysses), "--tokens", str(tokens)]
    line: dict[str, Any] = {"way": way, "processes": processes, "ulysses": ulysses, "tokens": tokens}
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder) / f"{rank}.json" for rank in range(processes)]
        started = []
        for rank, report in enumerate(reports):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "ACCELERATE_USE_CPU": "true",
            }
            mine = [*command, "--report", str(report)]
            started.append(subprocess.Popen(mine, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        said = [process.communicate()[0].decode() for process in started]
        for process, text in zip(started, said, strict=True):
            if process.returncode:
                raise SystemExit(f"{line} failed:\n{text[-3000:]}")
        ranks = [json.loads(report.read_text(encoding="utf-8")) for report in reports]
    return line | {name: max(rank[name] for rank in ranks) for name in ("live", "rss", "loss")}


def run_all(per_rank: int) -> list[dict[str, Any]]:
    """Every mesh with `per_rank` tokens a rank, and plain Transformers at the lengths that result."""
    lines = []
    for processes, ulysses in MESHES:
        tokens = per_rank * processes
        line = run_case("usp", processes, ulysses, tokens)
        lines.append(line | {"predicted": predicted(processes, ulysses, tokens)})
        print(f"  {processes} processes, ulysses {ulysses}, {tokens} tokens: done", flush=True)
    for tokens in sorted({line["tokens"] for line in lines}):
        lines.append(run_case("plain", 1, 1, tokens))
        print(f"  plain Transformers, {tokens} tokens: done", flush=True)
    return lines


def too_large(lines: list[dict[str, Any]], flat: float) -> list[dict[str, Any]]:
    """Runs on a mesh whose live bytes are over `flat` times those of one rank."""
    alone = next(line["live"] for line in lines if line["way"] == "usp" and line["processes"] == 1)
    return [line for line in lines if line["way"] == "usp" and line["live"] > flat * alone]


def as_table(lines: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = [
        "run",
        "tokens",
        "live bytes of a rank, MB",
        "predicted",
        "over one rank",
        "RSS, MB",
        "over one rank",
        "loss",
    ]
    rows = [head, ["---"] * len(head)]
    alone = lines[0]
    for line in lines:
        mesh = f"{line['processes']} processes, {line['processes'] // line['ulysses']} x {line['ulysses']}"
        usp = line["way"] == "usp"
        name = (mesh if line["processes"] > 1 else "1 process") if usp else "1 process, plain Transformers"
        guess = f"{line['predicted'] / 1e6:.0f}" if usp else ""
        ratios = [f"{line[x] / alone[x]:.2f}" if usp and alone[x] else "" for x in ("live", "rss")]
        rows.append(
            [name, f"{line['tokens']:,}", f"{line['live'] / 1e6:.0f}", guess, ratios[0], f"{line['rss'] / 1e6:.0f}"]
        )
        rows[-1] += [ratios[1], f"{line['loss']:.5f}"]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw(lines: list[dict[str, Any]], file: Path) -> None:
    """Live bytes and RSS over the length, both axes in powers of two."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    figure, sides = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    plain = [line for line in lines if line["way"] == "plain"]
    pure_ring, others = (
        [x for x in lines if x["way"] == "usp" and (x["ulysses"] == 1) is ring] for ring in (True, False)
    )
    for axes, key, title in zip(sides, ("live", "rss"), ("live bytes of a rank, MB", "RSS of a rank, MB"), strict=True):
        for some, style, colour, label in (
            (plain, "o-", "#8a97a6", "plain Transformers, one process"),
            (pure_ring, "o-", "#1b7f5c", "hf_usp, as many tokens a rank: 1, 2 x 1, 4 x 1 (ring x ulysses)"),
            (others, "s", "#4aa3df", "hf_usp: 1 x 2, 2 x 2"),
        ):
            axes.plot([x["tokens"] for x in some], [x[key] / 1e6 for x in some], style, color=colour, label=label)
        if key == "live":
            mine = pure_ring + others
            axes.plot(
                [x["tokens"] for x in mine],
                [x["predicted"] / 1e6 for x in mine],
                "x",
                color="#c2571a",
                label="predicted",
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set(xlabel="tokens in the sequence", title=title)
        axes.set_xticks(sorted({x["tokens"] for x in lines}))
        axes.set_yticks([2**n for n in range(7, 13)])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*sides[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-rank", type=int, default=8192, help="tokens of a rank")
    parser.add_argument("--flat", type=float, default=1.10, help="most that live bytes may grow with the ranks")
    parser.add_argument("--output", type=Path, default=Path("results"))
    # Of a process of a run.
    parser.add_argument("--way", choices=["plain", "usp"], help=argparse.SUPPRESS)
    parser.add_argument("--ulysses", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way is not None:
        args.report.write_text(json.dumps(measure(args.way, args.ulysses, args.tokens)), encoding="utf-8")
        return
    from notes import machine_notes

    lines = run_all(args.per_rank)
    notes = machine_notes(f"python benchmarks/length.py --per-rank {args.per_rank}")
    sizes = (
        f"Llama of {SIZES['num_hidden_layers']} layers, width {SIZES['hidden_size']}, 8 query and 4 kv heads, "
        f"vocabulary {SIZES['vocab_size']:,}, fp32; {args.per_rank:,} tokens a rank, loss_chunk_size, mlp_chunk_size "
        f"{CHUNK:,}, checkpointed layers; meshes as ring x ulysses. Weights and gradients are not counted."
    )
    text = "\n\n".join(["# Memory against length", *notes.values(), sizes, as_table(lines)])
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"length-{date.today().isoformat()}"
    stem.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    stem.with_suffix(".json").write_text(json.dumps(notes | {"lines": lines}, indent=1), encoding="utf-8")
    draw(lines, stem.with_suffix(".png"))
    print(f"{text}\n\nwritten to {stem}.md, .json and .png")
    if too_large(lines, args.flat):
        raise SystemExit(f"not flat: live bytes of a rank grow by more than {args.flat - 1:.0%} with the ranks")


if __name__ == "__main__":
    main()
