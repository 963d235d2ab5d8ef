"""One GPU's word about the whole: kernels, tiles, a virtual ring, launches, the longest step. Ten minutes.

    python benchmarks/gpu.py                       # or: make gpu (after the checks of every kernel)
    python benchmarks/gpu.py --device cpu --small  # a rehearsal of the same code without a GPU, under a minute

Expected on an H100 or H200: a ring of 8 virtual ranks of 8,192 rows costs at most 1 / 0.95 of the single kernel, packed
1 / 0.90. Writes results/gpu/<date>-<device>-benchmark.json, .md and .png, after every part, so that a run that is cut
off leaves what it has. Exit code 2: there is no such device.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
from longest import longest_steps  # noqa: E402
from notes import machine_notes  # noqa: E402
from virtual_ring import VirtualRing  # noqa: E402

import hf_usp  # noqa: E402
from hf_usp.batch.layout import MaskSpec, make_layout  # noqa: E402
from hf_usp.kernels import KERNELS, Request, Segments, Softmax, choose_kernel  # noqa: E402
from hf_usp.sharding.masks import Documents  # noqa: E402

HEADS, KV_HEADS, WIDTH = 32, 8, 128


class Bench:
    """The device, the sizes, and the clock."""

    def __init__(self, device: str, small: bool, minutes: float) -> None:
        self.device, self.small = torch.device(device), small
        self.heads, self.kv_heads, self.width = (4, 2, 64) if small else (HEADS, KV_HEADS, WIDTH)
        self.repeats = 1 if small else 5
        self.end = time.monotonic() + 60 * minutes
        self.kernel = choose_kernel(self.device, torch.bfloat16, self.width, Softmax(1.0)).name

    def left(self) -> float:
        """Seconds left."""
        return self.end - time.monotonic()

    def tensors(self, rows: int, keys: int | None = None) -> list[Tensor]:
        """q, k, v, dout in bf16, [L, heads, D]."""
        torch.manual_seed(0)
        lengths = ((rows, self.heads), (keys or rows, self.kv_heads), (keys or rows, self.kv_heads), (rows, self.heads))
        return [torch.randn(n, h, self.width, device=self.device).bfloat16() for n, h in lengths]

    def seconds(self, step: Callable[[], Any]) -> float:
        """Of the device, smallest of the repeats after one that warms up."""
        step()
        times = []
        for _ in range(self.repeats):
            if self.device.type == "cuda":
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                step()
                end.record()
                torch.cuda.synchronize()
                times.append(begin.elapsed_time(end) / 1e3)
            else:
                start = time.perf_counter()
                step()
                times.append(time.perf_counter() - start)
        return min(times)


def segments(edges_q: list[int], edges_k: list[int], right: int, device: torch.device) -> Segments:
    """One call without a window."""
    cu = (torch.tensor(edges, dtype=torch.int32, device=device) for edges in (edges_q, edges_k))
    return Segments(tuple(edges_q), tuple(edges_k), -1, right, *cu)


def both_ways(name: str, tensors: list[Tensor], what: Segments) -> list[Tensor]:
    """out, lse, dq, dk, dv of one kernel."""
    q, k, v, dout = tensors
    kernel, softmax = KERNELS[name], Softmax(q.shape[2] ** -0.5)
    out, lse = kernel.forward(q, k, v, what, softmax)
    return [out, lse, *kernel.backward(dout, q, k, v, out, lse, what, softmax)]


def kernels_against_eager(bench: Bench) -> list[dict[str, Any]]:
    """Error of every kernel that runs here over that of eager in bf16, both against eager in fp32."""
    rows, found = 512 if bench.small else 2048, []
    cases = {
        "causal": segments([0, rows], [0, rows], 0, bench.device),
        "full": segments([0, rows], [0, rows], -1, bench.device),
        "packed": segments([0, rows // 7, rows // 2, rows], [0, rows // 7, rows // 2, rows], 0, bench.device),
    }
    request = Request(bench.device, torch.bfloat16, bench.width, bench.width, Softmax(1.0))
    usable = [n for n, k in KERNELS.items() if n != "eager" and k.why_not(request) is None]
    for case, what in cases.items():
        tensors = bench.tensors(rows)
        exact = both_ways("eager", [t.float() for t in tensors], what)
        plain = both_ways("eager", tensors, what)
        for name in usable:
            mine = both_ways(name, tensors, what)
            triples = zip(("out", "lse", "dq", "dk", "dv"), mine, plain, exact, strict=True)
            ratios = {n: _error(m, e) / max(_error(p, e), 1e-6) for n, m, p, e in triples}
            found.append({"kernel": name, "case": case, **ratios})
    return found


def _error(value: Tensor, exact: Tensor) -> float:
    return float((value.float() - exact).norm() / exact.norm())


def tiles(bench: Bench) -> list[dict[str, Any]]:
    """FLOP/s of a square causal tile and of zigzag's two half tiles, over one plain causal call of the same area."""
    found = []
    for rows in (256, 512) if bench.small else (2048, 4096, 8192, 16384, 32768):
        shapes = {"causal": (rows, rows, 0), "all rows, half the keys": (rows, rows // 2, -1)}
        shapes |= {"half the rows, all keys": (rows // 2, rows, -1)}
        plain = plain_call(bench, rows)
        for shape, sizes in shapes.items():
            ours = tile_seconds(bench, *sizes)
            for way, flops in (("forward", 4), ("backward", 10)):
                # All three shapes cover rows^2 / 2.
                rate = flops * bench.heads * bench.width * rows * rows / 2 / ours[way] / 1e12
                share = plain[way] / ours[way]
                found.append({"rows": rows, "tile": shape, "way": way, "tflops": rate, "share of plain": share})
    return found


def tile_seconds(bench: Bench, q_rows: int, k_rows: int, right: int) -> dict[str, float]:
    """One kernel call of ours, forward and backward."""
    what = segments([0, q_rows], [0, k_rows], right, bench.device)
    softmax, kernel = Softmax(bench.width**-0.5), KERNELS[bench.kernel]
    q, k, v, dout = bench.tensors(q_rows, k_rows)
    out, lse = kernel.forward(q, k, v, what, softmax)
    return {
        "forward": bench.seconds(lambda: kernel.forward(q, k, v, what, softmax)),
        "backward": bench.seconds(lambda: kernel.backward(dout, q, k, v, out, lse, what, softmax)),
    }


def plain_call(bench: Bench, rows: int) -> dict[str, float]:
    """Seconds of torch's scaled_dot_product_attention, causal, forward and backward."""
    q, k, v, dout = (t.transpose(0, 1)[None] for t in bench.tensors(rows))
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))

    def forward() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    out = forward()
    return {
        "forward": bench.seconds(forward),
        "backward": bench.seconds(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)),
    }


def virtual_rings(bench: Bench) -> list[dict[str, Any]]:
    """Tiles and merges of all ranks of a ring, summed, over the single kernel on the whole sequence."""
    found = []
    rows = 128 if bench.small else 8192
    for degree in (2, 4) if bench.small else (2, 4, 8):
        tokens = rows * degree
        fifths = [0, *(tokens * i // 11 for i in (1, 2, 4, 7)), tokens]
        for case, edges in {"causal": [0, tokens], "packed": fifths}.items():
            if bench.left() < 60:
                break
            tensors = bench.tensors(tokens)
            whole = VirtualRing(edges, 1, tensors, bench.kernel)
            cut = VirtualRing(edges, degree, tensors, bench.kernel)
            with whole.mailbox.replacing():
                expected = whole.settle()
                alone = [bench.seconds(step) for step in (whole.forward, whole.backward)]
            with cut.mailbox.replacing():
                error = max(_error(a, b.float()) for a, b in zip(cut.settle(), expected, strict=True))
                spent = [bench.seconds(step) for step in (cut.forward, cut.backward)]
            found.append(
                {
                    "ranks": degree,
                    "rows": rows,
                    "case": case,
                    "forward": alone[0] / spent[0],
                    "backward": alone[1] / spent[1],
                    "both": sum(alone) / sum(spent),
                    "difference": error,
                }
            )
    return found


def launches(bench: Bench) -> list[dict[str, Any]]:
    """Host and device time of one attention call of a layer on one rank, forward; and the device's idle share."""
    found = []
    mesh = hf_usp.UspMesh.build(ring_degree=1, ulysses_degree=1)
    for rows in (256,) if bench.small else (1024, 4096, 16384):
        layout = make_layout(Documents.from_bounds([0, rows]), 1, rows, mesh)
        layout.device_schedule(MaskSpec(), bench.device)
        q, k, v, _ = (t[None] for t in bench.tensors(rows))

        def layers(count: int = 20, q: Tensor = q, k: Tensor = k, v: Tensor = v, layout: Any = layout) -> None:
            for _ in range(count):
                hf_usp.usp_attention(q, k, v, layout)

        device = bench.seconds(layers) / 20
        start = time.perf_counter()
        layers()
        host = (time.perf_counter() - start) / 20
        busy = _kernel_seconds(layers) / 20 if bench.device.type == "cuda" else device
        found.append(
            {"rows": rows, "host_us": host * 1e6, "device_us": device * 1e6, "idle": max(0.0, 1 - busy / device)}
        )
    return found


def _kernel_seconds(step: Callable[[], Any]) -> float:
    """Time that kernels ran, without the gaps between them."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


PARTS: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {
    "Every kernel against eager: error over eager's own in bf16": kernels_against_eager,
    "A tile against one plain causal call of the same area": tiles,
    "A virtual ring: the single kernel's time over tiles and merges of all ranks": virtual_rings,
    "Host and device time of one attention call": launches,
    "Longest training step": lambda bench: longest_steps(bench.device, bench.small, bench.left),
}


def as_markdown(notes: dict[str, str], parts: dict[str, list[dict[str, Any]]]) -> str:
    """The whole result."""

    def text(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = ["# GPU benchmark", "", *(f"{note}\n" for note in notes.values())]
    for title, rows in parts.items():
        lines += [f"## {title}", ""]
        if not rows:
            lines += ["Not run: no time left.", ""]
            continue
        head = list(rows[0])
        lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        lines += ["| " + " | ".join(text(row[key]) for key in head) + " |" for row in rows] + [""]
    return "\n".join(lines)


def draw(parts: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Tiles over their length, and the virtual rings."""
    try:
        import matplotlib
    except ImportError:
        print("gpu: no picture, matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    titles = list(parts)
    for tile in dict.fromkeys(row["tile"] for row in parts[titles[1]]):
        for way, style in (("forward", "-"), ("backward", "--")):
            own = [row for row in parts[titles[1]] if (row["tile"], row["way"]) == (tile, way)]
            left.plot([r["rows"] for r in own], [r["tflops"] for r in own], style, marker="o", label=f"{tile}, {way}")
    left.set(xscale="log", xlabel="rows", ylabel="TFLOP/s", title="tiles")
    left.legend(fontsize=7, frameon=False)
    rings = parts[titles[2]]
    right.bar(range(len(rings)), [row["both"] for row in rings], color="#1b7f5c")
    right.set_xticks(range(len(rings)), [f"{row['case']}\n{row['ranks']} ranks" for row in rings], fontsize=8)
    right.axhline(0.95, color="black", linewidth=0.6)
    right.set(title="single kernel over all tiles and merges", ylim=(0, 1.1))
    figure.savefig(file, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script itself")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "gpu")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            f"gpu: torch {torch.__version__} finds no CUDA device. Run it on a machine with an NVIDIA GPU and a CUDA "
            "build of torch, or try the script itself with --device cpu --small.",
            file=sys.stderr,
        )
        return 2
    bench = Bench(args.device, args.small, args.minutes)
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu"
    sizes = (
        f"{bench.heads} query and {bench.kv_heads} kv heads of width {bench.width}, bf16; kernel {bench.kernel}; {name}"
    )
    arguments = " --small" * args.small + f" --device {args.device}" * (args.device != "cuda")
    notes = machine_notes(f"python benchmarks/gpu.py{arguments}") | {"sizes": sizes}
    args.output.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    stem = args.output / f"{date.today().isoformat()}-{slug}-benchmark"
    parts: dict[str, list[dict[str, Any]]] = {}
    for title, part in PARTS.items():
        parts[title] = part(bench) if bench.left() > 20 else []
        print(f"{title}: done, {bench.left():.0f} s left", flush=True)
        stem.with_suffix(".md").write_text(as_markdown(notes, parts))
        stem.with_suffix(".json").write_text(json.dumps(notes | {"parts": parts}, indent=1) + "\n")
    draw(parts, stem.with_suffix(".png"))
    print(f"{as_markdown(notes, parts)}\nwritten to {stem}.md, .json and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
