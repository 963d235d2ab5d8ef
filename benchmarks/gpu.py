"""One GPU's word about the whole, in parts, the most wanted first; each has its prediction beside what it measures.

    python benchmarks/gpu.py                             # all parts, an hour at most; or: make gpu, which checks first
    python benchmarks/gpu.py --part rates --part memory  # some of them, ten minutes each at most
    python benchmarks/gpu.py --device cpu --small        # a rehearsal without a GPU, about a minute

Parts: kernels, waits, rates, workspaces, memory, tiles, ring, host, streams, copies, longest. Each writes
results/gpu/<date>-<device>-<part>.md and .json when it ends, so that a run that is cut off leaves what it has. Columns
that begin with "predicted" hold figures from before any GPU ran; nan where nothing is predicted. Exit code 2: there is
no such device.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
import gpu_host  # noqa: E402
import gpu_kernels  # noqa: E402
import gpu_memory  # noqa: E402
from gpu_bench import Bench  # noqa: E402
from longest import longest_steps  # noqa: E402
from notes import machine_notes  # noqa: E402

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """One question to a GPU.

    Attributes:
        title: the figures.
        expected: the prediction in words, and what another result would mean.
        measure: the rows of its table.
    """

    title: str
    expected: str
    measure: Callable[[Bench], Rows]


# In the order of worth: wrong numbers, then what decides the plans, then what confirms them.
PARTS: dict[str, Part] = {
    "kernels": Part(
        "Every kernel against eager: error over eager's own in bf16",
        "At most 2, mostly 1. More: that kernel is wrong; name another with `kernel=` and report it.",
        gpu_kernels.kernels_against_eager,
    ),
    "waits": Part(
        "Waits of the host for the device in a micro-batch",
        f"{gpu_host.WAITS_OF_A_BATCH} on one rank, the same for 2 layers and for 6. More with more layers: the device "
        "idles in every layer. On a mesh no more: the ranks' agreement comes in the same copy. torch also counts "
        "copies from pageable memory, which are made once a mask and batch.",
        gpu_host.host_waits,
    ),
    "rates": Part(
        "TFLOP/s of long tiles",
        "The planner's rates within a tenth at 32,768 rows and more. Others belong into `hf_usp.planner.hardware`.",
        gpu_kernels.rates,
    ),
    "workspaces": Part(
        "Bytes of a call beside its results, over those of its queries",
        "The planner's, which were read in sources. Larger: a plan that fits may not.",
        gpu_kernels.workspaces,
    ),
    "memory": Part(
        "GB at the peak of a step of two layers of Llama 3 8B",
        "Within 5 % of the simulated step, 10 % of the planner's.",
        gpu_memory.step_memory,
    ),
    "tiles": Part(
        "A tile against one plain causal call of the same area",
        "The planner's shares; FA2's copies that pad latent attention's values are below 1 %. Lower at 4,096 rows and "
        "more: a ring needs longer tiles than planned.",
        gpu_kernels.tiles,
    ),
    "ring": Part(
        "A virtual ring: the single kernel's time over tiles and merges of all ranks",
        "At least 0.95, packed 0.90, from 8,192 rows a rank on.",
        gpu_kernels.virtual_rings,
    ),
    "host": Part(
        "Host and device time of one attention call",
        "The device is never idle from 4,096 rows on. Idle: the step is bound by the host.",
        gpu_host.launches,
    ),
    "streams": Part(
        "Messages held while the host runs ahead",
        "All of them with new memory, one with a ring's buffers. With two GPUs, in a profile of a ring, besides: of "
        "messages of keys only the first begins when a tile ends, gradients' begin before the next tile (priority), "
        "and none waits for another (one communicator); docs/decisions/0031.",
        gpu_host.streams,
    ),
    "copies": Part(
        "Copies between the device and page-locked host memory",
        "At least the planner's rate; it decides whether offloading hides behind attention.",
        gpu_host.copies,
    ),
    "longest": Part(
        "Longest training step",
        "Several times as long as plain Transformers.",
        lambda bench: longest_steps(bench.device, bench.small, bench.left),
    ),
}


def as_markdown(notes: dict[str, str], part: Part, rows: Rows) -> str:
    """The whole result of a part."""

    def text(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [f"# {part.title}", "", *(f"{note}\n" for note in notes.values()), f"Predicted: {part.expected}", ""]
    if not rows:
        return "\n".join([*lines, "Not run: no time left, or nothing to measure here.", ""])
    head = list(dict.fromkeys(key for row in rows for key in row))
    lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(text(row.get(key, "")) for key in head) + " |" for row in rows]
    return "\n".join([*lines, ""])


def draw(rows: Rows, file: Path) -> None:
    """Rates over the length of a tile, the planner's dotted."""
    try:
        import matplotlib
    except ImportError:
        print("gpu: no picture, matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for axis, way in zip(axes, ("forward", "backward"), strict=True):
        for kernel, tile in dict.fromkeys((row["kernel"], row["tile"]) for row in rows):
            own = [row for row in rows if (row["kernel"], row["tile"], row["way"]) == (kernel, tile, way)]
            lengths = [row["rows"] for row in own]
            (line,) = axis.plot(lengths, [row["tflops"] for row in own], marker="o", label=f"{kernel}, {tile}")
            axis.plot(lengths, [row["predicted"] for row in own], ":", color=line.get_color())
        axis.set(xscale="log", xlabel="rows", ylabel="TFLOP/s", title=f"{way}; dotted: predicted")
        axis.legend(fontsize=7, frameon=False)
    figure.savefig(file, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script itself")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all of them")
    parser.add_argument("--minutes", type=float, default=10.0, help="of each part, at most")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "gpu")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            f"gpu: torch {torch.__version__} finds no CUDA device. Run it on a machine with an NVIDIA GPU and a CUDA "
            "build of torch, or try the script itself with --device cpu --small.",
            file=sys.stderr,
        )
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.part or PARTS:
        part, bench, start = PARTS[name], Bench(args.device, args.small, args.minutes), time.monotonic()
        arguments = f" --part {name}" + " --small" * args.small + f" --device {args.device}" * (args.device != "cuda")
        sizes = f"{bench.heads} query and {bench.kv_heads} kv heads of width {bench.width}, bf16"
        notes = machine_notes(f"python benchmarks/gpu.py{arguments}")
        notes["sizes"] = f"{sizes}; kernel {bench.kernel}; {bench.name}"
        rows = part.measure(bench)
        text = as_markdown(notes, part, rows)
        print(f"{text}\n{name}: {time.monotonic() - start:.0f} s\n", flush=True)
        slug = re.sub(r"[^a-z0-9]+", "-", bench.name.lower()).strip("-")
        stem = args.output / f"{date.today().isoformat()}-{slug}-{name}"
        stem.with_suffix(".md").write_text(text, encoding="utf-8")
        stem.with_suffix(".json").write_text(json.dumps(notes | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
        if name == "rates" and rows:
            draw(rows, stem.with_suffix(".png"))
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
