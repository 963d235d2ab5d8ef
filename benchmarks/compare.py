"""One causal attention call, forward and backward, of this library and of others: same inputs, processes and kernel.

    python benchmarks/compare.py --peers build/peers          # 4,096 tokens, bf16, 2 and 4 processes, 5 minutes
    python benchmarks/compare.py                              # without the peers that are not installed

`peers.py` says how to install the others into build/peers and what was done to run them on CPU. All contenders live in
the same processes and take turns, so that what disturbs one disturbs all. Counted per rank: bytes on the wire,
messages, launched area, copies, saved bytes, and transfers that no tile was computed beside; these repeat. CPU time is
the smallest of the repeats, and paired with one process of the same round; wall time is only information. Writes
results/compare-<date>.md, .json and .png.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
import warnings
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from counting import Counts, count, watched_transfers  # noqa: E402
from notes import machine_notes  # noqa: E402

HEADS, KV_HEADS, WIDTH = 8, 4, 64


def inputs(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output, whole: [1, S, heads, D], the same on every rank."""
    torch.manual_seed(0)
    return [torch.randn(1, tokens, heads, WIDTH).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The whole in one process."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def results_of(attend: Any, tensors: list[Tensor]) -> list[Tensor]:
    """out, dq, dk, dv."""
    q, k, v = (t.detach().clone().requires_grad_() for t in tensors[:3])
    out = attend(q, k, v)
    out.backward(tensors[3])
    return [out.detach(), *(t.grad for t in (q, k, v) if t.grad is not None)]


def errors(contender: Any, tokens: int, dtype: torch.dtype) -> list[float]:
    """Root mean square error of out, dq, dk, dv over that of one process in the same dtype; the oracle is fp64."""
    full = inputs(tokens, dtype)
    oracle = results_of(sdpa, [t.double() for t in full])
    alone = results_of(sdpa, full)
    mine = results_of(contender.attend, [contender.shard(t) for t in full])
    sums = []
    for part, whole, exact in zip(mine, alone, oracle, strict=True):
        here = (part.double() - contender.shard(exact)).square().sum()
        sums += [here, (whole.double() - exact).square().sum() / dist.get_world_size()]
    totals = torch.stack(sums)
    dist.all_reduce(totals)
    return (totals[0::2] / totals[1::2].clamp_min(1e-300)).sqrt().tolist()


def rank_main(rank: int, world: int, port: int, args: argparse.Namespace, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world), OMP_NUM_THREADS="1")
    sys.path.append(str(args.peers))  # last: nothing of ours is replaced
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    from peers import contenders

    dtype = getattr(torch, args.dtype)
    found, missing = contenders(args.tokens)
    full = inputs(args.tokens, dtype)
    steps, rows = [], []
    for contender in found:
        row: dict[str, Any] = {"name": contender.name, "ulysses": contender.ulysses, "ring": contender.ring}
        row |= {"note": contender.note, "error": errors(contender, args.tokens // 4, dtype)}
        q, k, v, gradient = (contender.shard(t) for t in full)
        q, k, v = (t.clone().requires_grad_() for t in (q, k, v))

        def step(attend: Any = contender.attend, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return attend(q, k, v)

        with watched_transfers() as transfers:
            row["counts"] = count(step, gradient, 0).as_dict()
        # `count` runs the step twice.
        row |= {"exposed": -1 if transfers.unseen else transfers.exposed // 2, "hops": transfers.hops // 2}
        rows.append(row | {"times": []})
        steps.append((step, gradient))
        if rank == 0:
            print(f"  {contender.name}, ulysses {contender.ulysses} x ring {contender.ring}: counted", flush=True)
    alone = [t.clone().requires_grad_() for t in full[:3]]
    times = take_turns(steps, lambda: sdpa(*alone), full[3], args.repeats)
    for row, spent in zip(rows, times[1:], strict=True):
        row["times"] = spent
    results[rank] = rows, times[0], missing
    dist.barrier()
    dist.destroy_process_group()


def take_turns(steps: list, alone: Any, gradient: Tensor, repeats: int) -> list[list[tuple[float, float]]]:
    """(CPU, wall) seconds of one process, then of every step, in each round."""
    times: list[list[tuple[float, float]]] = [[] for _ in range(len(steps) + 1)]
    for _ in range(repeats):
        for i, (step, grad) in enumerate([(alone, gradient), *steps]):
            dist.barrier()
            cpu, wall = time.process_time(), time.perf_counter()
            if i or dist.get_rank() == 0:
                step().backward(grad)
            times[i].append((time.process_time() - cpu, time.perf_counter() - wall))
    return times


def run_world(world: int, args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One line per contender on this many processes, and what is missing."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(rank_main, (world, port, args, results), nprocs=world)
        ranks = [results[rank] for rank in range(world)]
    alone = [cpu for cpu, _ in ranks[0][1]]
    lines = [summarise([rows[i] for rows, _, _ in ranks], alone, args) for i in range(len(ranks[0][0]))]
    return lines, ranks[0][2]


def summarise(ranks: list[dict[str, Any]], alone: list[float], args: argparse.Namespace) -> dict[str, Any]:
    """Sums or maxima over the ranks of a contender, over the floors of its mesh."""
    first, world = ranks[0], len(ranks)
    ulysses, ring, size = first["ulysses"], first["ring"], getattr(torch, args.dtype).itemsize
    unit = args.tokens // world * WIDTH * size
    kept_kv = max(KV_HEADS, ulysses)
    # Per rank, both directions: the head exchange, and a ring that passes whole blocks in this dtype.
    unpruned = 2 * (2 * HEADS + 2 * kept_kv) * (1 - 1 / ulysses) * unit + 6 * kept_kv * (ring - 1) * unit
    saved_floor = (2 * HEADS + 2 * kept_kv) * unit + args.tokens // world * HEADS * 4
    counts = [Counts(**row["counts"]) for row in ranks]
    areas = [c.area for c in counts]
    busiest = max(counts, key=lambda c: c.collectives + c.messages + c.collectives_backward + c.messages_backward)
    slowest = [max(row["times"][i][0] for row in ranks) for i in range(len(alone))]
    sent = sum(c.wire_forward + c.wire_backward for c in counts) / world
    return {
        "name": first["name"],
        "note": first["note"],
        "mesh": f"{ring}x{ulysses}",
        "world": world,
        "sent_MB": sent / 1e6,
        "sent_over_unpruned": sent / unpruned,
        "collectives": f"{busiest.collectives} + {busiest.collectives_backward}",
        "messages": f"{busiest.messages} + {busiest.messages_backward}",
        "exposed": _exposed(ranks),
        # Blocks of formulas are no kernel calls that could be counted.
        "area_max_over_mean": max(areas) * world / sum(areas) if sum(areas) else "-",
        "area_over_ideal": sum(areas) / (HEADS * args.tokens * (args.tokens + 1) / 2) if sum(areas) else "-",
        "copied_over_payload": sum(c.copied + c.copied_backward for c in counts)
        / (2 * world * (2 * HEADS + 2 * KV_HEADS) * unit),
        "saved_over_floor": sum(c.saved for c in counts) / (world * saved_floor),
        "cpu_ms": min(slowest) * 1e3,
        "efficiency": min(alone) / (world * min(slowest)),
        "efficiency_paired": median(a / (world * s) for a, s in zip(alone, slowest, strict=True)),
        "wall_ms": min(max(row["times"][i][1] for row in ranks) for i in range(len(alone))) * 1e3,
        "error": first["error"],
    }


def _exposed(ranks: list[dict[str, Any]]) -> str:
    most, hops = max(row["exposed"] for row in ranks), max(row["hops"] for row in ranks)
    if hops == 0:
        return "none sent"
    return f"not seen, of {hops}" if most < 0 else f"{most} of {hops}"


HEAD = {
    "name": "who",
    "mesh": "ring x ulysses",
    "sent_MB": "sent a rank, MB",
    "sent_over_unpruned": "sent/unpruned floor",
    "collectives": "collectives",
    "messages": "messages",
    "exposed": "transfers beside no tile",
    "area_max_over_mean": "area max/mean",
    "area_over_ideal": "area/ideal",
    "copied_over_payload": "copied/(2h+2hk) u",
    "saved_over_floor": "saved/floor",
    "error": "error over one process: out, dq, dk, dv",
    "cpu_ms": "CPU ms, slowest",
    "efficiency": "CPU efficiency",
    "efficiency_paired": "paired",
    "wall_ms": "wall ms",
}


def as_table(lines: list[dict[str, Any]]) -> str:
    """Markdown."""

    def text(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(f"{x:.2f}" if x < 100 else f"**{x:.0f}**" for x in value)
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    cells = [[text(line[key]) for key in HEAD] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(HEAD.values()), ["---"] * len(HEAD), *cells])


def draw(lines: list[dict[str, Any]], file: Path) -> None:
    """Bytes over the unpruned floor, and CPU efficiency, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, sides = pyplot.subplots(1, 2, figsize=(13, 0.32 * len(lines) + 1.5), sharey=True, layout="constrained")
    names = [f"{line['name']}  {line['mesh']}" for line in lines]
    colours = ["#1b7f5c" if line["name"] == "hf_usp" else "#8a97a6" for line in lines]
    titles = {"sent_over_unpruned": "bytes sent, over the floor of an unpruned ring (less is better)"}
    titles |= {"efficiency_paired": "CPU efficiency, paired with one process (more is better)"}
    for axes, (key, title) in zip(sides, titles.items(), strict=True):
        bars = axes.barh(range(len(lines)), [line[key] for line in lines], color=colours)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        axes.axvline(1, color="black", linewidth=0.6)
        axes.set_yticks(range(len(lines)), names, fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    sides[0].invert_yaxis()
    figure.suptitle("Causal attention, forward and backward (ring x ulysses)", fontsize=10)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), help="folder with the other libraries")
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()
    lines: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    for world in args.worlds:
        print(f"{world} processes", flush=True)
        more, absent = run_world(world, args)
        lines, missing = lines + more, missing | absent
    command = f"python benchmarks/compare.py --tokens {args.tokens} --repeats {args.repeats} --dtype {args.dtype}"
    notes = machine_notes(command) | {
        "sizes": f"{args.tokens} tokens, {HEADS} query and {KV_HEADS} kv heads of width {WIDTH}, one row, causal"
    }
    remarks = dict.fromkeys(f"{line['name']}: {line['note']}" for line in lines if line["note"])
    text = "\n\n".join(
        ["# Attention, this library and others", *notes.values(), as_table(lines), EXPLANATION]
        + ["\n".join(f"* {remark}" for remark in [*remarks, *(f"{k}: {v}" for k, v in missing.items())])]
    )
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"compare-{date.today().isoformat()}"
    stem.with_suffix(".md").write_text(text + "\n")
    stem.with_suffix(".json").write_text(json.dumps(notes | {"lines": lines, "missing": missing}, indent=1))
    draw(lines, stem.with_suffix(".png"))
    print(f"{text}\n\nwritten to {stem}.md, .json and .png")


EXPLANATION = """Sent: all bytes written by a rank, both directions, over `2 (2h + 2m)(1 - 1/U) u + 6 m (R - 1) u`,
the floor of a ring that passes whole blocks on in the tensors' dtype; pruned zigzag can reach 0.75 of the ring's part.
Collectives, messages: of the busiest rank, forward + backward, as far as torch's dispatcher shows them (DeepSpeed's
are hidden from it in part). Transfers beside no tile: asynchronous ones, both
directions, for which the rank waited without having computed anything since they began; blocking collectives are not
among them. Errors are ratios of root mean squares at a quarter of the length: 1 is as good as one process, bold is
wrong. CPU efficiency is the CPU time of one process over ranks times slowest rank, smallest of all rounds; paired is
the median of the rounds' own ratios."""


if __name__ == "__main__":
    main()
