"""One attention call, forward and backward, in one process and over 1x2, 2x1 and 2x2 (ring x ulysses) CPU processes.

    python benchmarks/attention.py                      # 4,096 tokens, bf16 and fp32, 4 to 8 minutes
    python benchmarks/attention.py --tokens 1024 --repeats 1 --dtypes float32

Prints prediction beside measurement per case (other libraries: compare.py) and writes results/attention-<date>.json,
.md and .png with hardware, versions and this command. Bytes, messages, mask area, copies and saved bytes repeat; CPU
time repeats to a few per cent; wall time is only information.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))
import memory  # noqa: E402
from counting import count  # noqa: E402

import hf_usp  # noqa: E402
from hf_usp.batch.layout import MaskSpec, make_layout  # noqa: E402
from hf_usp.batch.shard import shard_tensor  # noqa: E402
from hf_usp.sharding.heads import split_heads  # noqa: E402
from hf_usp.sharding.masks import Documents  # noqa: E402

HEADS, KV_HEADS, WIDTH = 8, 4, 64
MESHES = [(1, 1), (1, 2), (2, 1), (2, 2)]
NOTES = """All-to-alls, messages: of the busiest rank, forward + backward. Copied: all copies and casts that were seen,
those of kernels and merges included, mean of forward and backward; the causal 1x2 row is the ulysses relayout alone."""
CASES = ["causal", "window", "packed", "aligned"]


def documents_of(case: str, tokens: int) -> Documents:
    """Documents of uneven lengths for "packed", four that end where shards end for "aligned", one otherwise."""
    if case == "packed":
        return Documents.from_bounds([0, tokens // 7, tokens // 3, tokens // 2, tokens * 5 // 6, tokens])
    return Documents.from_bounds([0, *(tokens * i // 4 for i in ((1, 2, 3) if case == "aligned" else ())), tokens])


def predict(layout: hf_usp.SequenceLayout, kind: MaskSpec, size: int) -> dict[str, float]:
    """Bytes, messages and area of this rank from the plan alone, and the least that must be saved and copied."""
    mesh, plan = layout.mesh, layout.ring_schedule(kind)
    shares = split_heads(HEADS, KV_HEADS, mesh.ulysses_degree)
    mine = shares[mesh.ulysses_rank]
    unit = layout.local_length * WIDTH * size
    others = [share for rank, share in enumerate(shares) if rank != mesh.ulysses_rank]
    out = sum(share.num_query + 2 * share.num_kv for share in others) * unit
    back = len(others) * mine.num_query * unit
    row = 2 * mine.num_kv * WIDTH * size
    returning = sum(step.num_received for step in plan.steps) * row
    lse = layout.local_length * mesh.ulysses_degree * mine.num_query * (8 if size == 8 else 4)
    tensors = plan.num_tokens * (2 * mine.num_query + 2 * mine.num_kv) * WIDTH * size
    exchange = mesh.ulysses_degree > 1
    return {
        "wire_forward": out + back + plan.rows_sent * row,
        "wire_backward": out + back + plan.rows_sent * row + returning,
        "all_to_alls": 2 * exchange,
        "messages": plan.messages,
        "messages_backward": plan.messages + sum(step.num_received > 0 for step in plan.steps),
        "area": plan.area * mine.num_query,
        "saved": tensors + lse,
        "payload": (2 * HEADS + 2 * KV_HEADS) * unit,
    }


def rank_main(rank: int, world: int, port: int, args: argparse.Namespace, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = []
    for ring, ulysses in [mesh for mesh in MESHES if mesh[0] * mesh[1] == world]:
        mesh = hf_usp.UspMesh.build(ring_degree=ring, ulysses_degree=ulysses)
        for name in args.dtypes:
            dtype = getattr(torch, name)
            for case in CASES:
                kind = MaskSpec(window_left=args.tokens // 8 - 1) if case == "window" else MaskSpec()
                layout = make_layout(documents_of(case, args.tokens), 1, args.tokens, mesh, "auto", (kind,))
                torch.manual_seed(0)
                full = [torch.randn(1, args.tokens, heads, WIDTH).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]
                q, k, v = (shard_tensor(x, layout).contiguous().requires_grad_() for x in full)
                gradient = torch.randn_like(q)
                window = args.tokens // 8 if case == "window" else None

                def step(q: Any = q, k: Any = k, v: Any = v, layout: Any = layout, window: Any = window) -> Any:
                    return hf_usp.usp_attention(q, k, v, layout, sliding_window=window)

                measured = count(step, gradient, args.repeats)
                rows.append(
                    {"case": case, "dtype": name, "ring": ring, "ulysses": ulysses, "order": layout.order, "rank": rank}
                    | {"measured": measured.as_dict(), "predicted": predict(layout, kind, q.element_size())}
                )
                if rank == 0 and world > 1:
                    print(f"  {case}, {name}, ring {ring} x ulysses {ulysses}: done", flush=True)
    results[rank] = rows, memory.peaks(world)
    dist.destroy_process_group()


def run_world(world: int, args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All rows and all peaks of all ranks for the meshes of this many processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(rank_main, (world, port, args, results), nprocs=world)
        rows, peaks = zip(*(results[rank] for rank in range(world)), strict=True)
        return sum(rows, []), sum(peaks, [])


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per case and mesh: sums or maxima over its ranks, measured over predicted, against one process."""
    keys = {(r["case"], r["dtype"], r["ring"], r["ulysses"]): None for r in rows}
    lines = []
    for key in keys:
        ranks = [r for r in rows if (r["case"], r["dtype"], r["ring"], r["ulysses"]) == key]
        alone = next(r for r in rows if (r["case"], r["dtype"]) == key[:2] and r["ring"] * r["ulysses"] == 1)

        def total(name: str, side: str = "measured", ranks: list = ranks) -> float:
            return sum(r[side][name] for r in ranks)

        areas = [r["measured"]["area"] for r in ranks]
        busiest = max((r["measured"] for r in ranks), key=lambda m: m["messages"] + m["messages_backward"])
        copied = total("copied") + total("copied_backward")
        slowest = max(r["measured"]["cpu_seconds"] for r in ranks)
        lines.append(
            {
                "case": key[0],
                "dtype": key[1],
                "mesh": f"{key[2]}x{key[3]}",
                "order": ranks[0]["order"],
                "wire_MB": (total("wire_forward") + total("wire_backward")) / 1e6,
                "wire_predicted_MB": (total("wire_forward", "predicted") + total("wire_backward", "predicted")) / 1e6,
                "area_max_over_mean": max(areas) * len(areas) / sum(areas),
                "area_over_ideal": sum(areas) / total("area", "predicted"),
                "all_to_alls": _both_ways(busiest, "all_to_alls"),
                "messages": _both_ways(busiest, "messages"),
                "copied_over_payload": copied / (2 * total("payload", "predicted")),
                "saved_over_floor": total("saved") / total("saved", "predicted"),
                "cpu_ms": slowest * 1e3,
                "cpu_efficiency": alone["measured"]["cpu_seconds"] / (len(ranks) * slowest),
                "wall_ms": max(r["measured"]["wall_seconds"] for r in ranks) * 1e3,
            }
        )
    return lines


def _both_ways(measured: dict[str, int], name: str) -> str:
    return f"{measured[name]} + {measured[name + '_backward']}"


def as_table(lines: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = {
        "case": "case",
        "dtype": "dtype",
        "mesh": "ring x ulysses",
        "order": "order",
        "wire_MB": "sent, MB",
        "wire_predicted_MB": "predicted, MB",
        "area_max_over_mean": "area max/mean",
        "area_over_ideal": "area/ideal",
        "all_to_alls": "all-to-alls",
        "messages": "messages",
        "copied_over_payload": "copied/(2h + 2hk) u",
        "saved_over_floor": "saved/floor",
        "cpu_ms": "CPU ms",
        "cpu_efficiency": "CPU efficiency",
        "wall_ms": "wall ms",
    }
    cells = [[f"{x:.3f}" if isinstance(x, float) else str(x) for x in (line[k] for k in head)] for line in lines]
    rows = [list(head.values()), ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw(lines: list[dict[str, Any]], file: Path) -> None:
    """Bytes predicted and counted per case, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [line for line in lines if line["mesh"] != "1x1"]
    names = [f"{line['case']}\n{line['mesh']} {line['dtype']}" for line in shown]
    figure, axes = pyplot.subplots(figsize=(max(8, len(shown)), 4.5), layout="constrained")
    places = range(len(shown))
    axes.bar([p - 0.2 for p in places], [line["wire_predicted_MB"] for line in shown], 0.4, label="predicted")
    axes.bar([p + 0.2 for p in places], [line["wire_MB"] for line in shown], 0.4, label="counted")
    axes.set_xticks(list(places), names, fontsize=7)
    axes.set_ylabel("MB sent by all ranks, forward and backward")
    axes.set_title("Bytes on the wire (ring x ulysses)")
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    peaks: list[dict[str, Any]] = []
    for world in (1, 2, 4):
        print(f"{world} process(es)", flush=True)
        of_ranks, of_memory = run_world(world, args)
        rows += of_ranks
        peaks += of_memory
    lines = summarise(rows)
    table = f"{as_table(lines)}\n\n{NOTES}\n\nPeak memory of a rank, {memory.PER_RANK} tokens on each:\n\n"
    table += memory.summarise(peaks)
    cpu = next((x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")), "unknown")
    machine = f"{os.cpu_count()} cores, {cpu}, {platform.system()}"
    versions = f"torch {torch.__version__}, hf_usp {hf_usp.__version__}, Python {platform.python_version()}"
    sizes = f"{args.tokens} tokens, {HEADS} query and {KV_HEADS} kv heads of width {WIDTH}, one row"
    command = f"python benchmarks/attention.py --tokens {args.tokens} --repeats {args.repeats} --dtypes"
    command = " ".join([command, *args.dtypes])
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"attention-{date.today().isoformat()}"
    stem.with_suffix(".md").write_text(f"# Attention\n\n`{command}`\n\n{sizes}\n\n{machine}\n\n{versions}\n\n{table}\n")
    notes = {"command": command, "sizes": sizes, "machine": machine, "versions": versions}
    stem.with_suffix(".json").write_text(json.dumps({**notes, "lines": lines, "ranks": rows, "peaks": peaks}, indent=1))
    draw(lines, stem.with_suffix(".png"))
    print(f"{table}\n\nwritten to {stem}.md, .json and .png")


if __name__ == "__main__":
    main()
