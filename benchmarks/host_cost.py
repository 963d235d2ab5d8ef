"""The host cost of an attention call, forward and backward: Python calls, operators, messages and CPU time of a layer.

    python benchmarks/host_cost.py                      # nine meshes, a minute
    python benchmarks/host_cost.py --meshes 1x2 8x1 --repeats 20

One process stands for rank 0 of every mesh: torch's fake process group takes messages and delivers nothing. Tensors
are tiny, so what is left is what the host does for a layer of any size. "Without kernels": the kernel is replaced by
one that returns zeros; on a GPU the launches of the real one come on top. The prediction: a step of the ring costs what
it does on two ranks, whatever its length, and the exchange of heads what it does on two, on however many. CPU time of
a busy machine varies by a factor; the counts repeat. Writes results/host_cost-<date>.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.testing._internal.distributed import fake_pg  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
from notes import machine_notes  # noqa: E402

import hf_usp  # noqa: E402
from hf_usp.attention import call as core  # noqa: E402
from hf_usp.attention.functional import attend  # noqa: E402
from hf_usp.batch.context import ForwardContext  # noqa: E402
from hf_usp.batch.layout import MaskSpec, make_layout  # noqa: E402
from hf_usp.batch.sharded_tensors import ShardedMask, make_handle  # noqa: E402
from hf_usp.kernels import Segments, Softmax, accumulation_dtype  # noqa: E402
from hf_usp.sharding.masks import Documents  # noqa: E402

SMALLEST = ("1x1", "1x2", "2x1")  # predict the others
MESHES = ["1x1", "1x2", "2x1", "2x2", "1x8", "4x1", "8x1", "4x4", "8x8"]
HEADS, KV_HEADS, WIDTH, TOKENS = 8, 8, 16, 16
PACKAGE = str(Path(hf_usp.__file__).parent)


@dataclass
class HostCounts:
    """The host's work for one layer; these counts repeat.

    Attributes:
        calls: Python functions entered, those of torch included.
        own_calls: those of hf_usp.
        operators: operators of torch, views included, without messages.
        messages: batches of sends and receives.
        all_to_alls: exchanges of heads for tokens.
    """

    calls: int = 0
    own_calls: int = 0
    operators: int = 0
    messages: int = 0
    all_to_alls: int = 0


class NoKernel:
    """Returns zeros of the right shapes."""

    name = "none"

    def why_not(self, *_: Any) -> None:
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, softmax: Softmax) -> tuple[Tensor, Tensor]:
        lse = torch.zeros((q.shape[1], q.shape[0]), dtype=accumulation_dtype(q.dtype))
        return torch.zeros((*q.shape[:2], v.shape[2]), dtype=q.dtype), lse

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v))
        return dq, dk, dv


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_ranks(size: int) -> Iterator[None]:
    """This process is rank 0 of so many, whose messages nobody reads."""
    hook = sys.excepthook  # a mesh replaces it
    dist.init_process_group("fake", rank=0, world_size=size, store=fake_pg.FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


def layer(ring: int, ulysses: int) -> Callable[[], None]:
    """One causal attention call over such a mesh, forward and backward, of a layer that is not the first."""
    mesh = hf_usp.UspMesh.build(ring_degree=ring, ulysses_degree=ulysses)
    tokens = TOKENS * ring * ulysses
    layout = make_layout(Documents.from_bounds([0, tokens]), 1, tokens, mesh)
    mask, softmax = ShardedMask(make_handle(ForwardContext(layout)), MaskSpec()), Softmax(WIDTH**-0.5)
    shapes = [(1, layout.local_length, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
    gradient = torch.ones_like(q)

    def step() -> None:
        attend((q, k, v, None), mask, softmax).backward(gradient)

    step()  # schedules are made; gradients have their memory
    return step


def count(step: Callable[[], None]) -> HostCounts:
    """Counts of one step."""
    counts = HostCounts()

    def entered(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            counts.calls += 1
            counts.own_calls += frame.f_code.co_filename.startswith(PACKAGE)

    before = sys.getprofile()
    sys.setprofile(entered)
    try:
        step()
    finally:
        sys.setprofile(before)
    with _Operators() as seen:
        step()
    counts.messages = seen.found["c10d.send.default"]
    counts.all_to_alls = seen.found["c10d.alltoall_base_.default"]
    counts.operators = sum(n for name, n in seen.found.items() if not name.startswith("c10d."))
    return counts


def counts_of(ring: int, ulysses: int) -> HostCounts:
    """Of one layer on a fake mesh, without its kernels."""
    with fake_ranks(ring * ulysses), patch.object(core, "choose_kernel", lambda *_: NoKernel()):
        return count(layer(ring, ulysses))


def cpu_us(step: Callable[[], Any], repeats: int) -> float:
    """CPU time of a step in microseconds; the smallest of several."""
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        for _ in range(20):
            step()
        times.append((time.process_time() - begun) / 20 * 1e6)
    return min(times)


def measure(ring: int, ulysses: int, repeats: int) -> dict[str, Any]:
    """Counts and CPU time of a layer on one mesh."""
    counts = counts_of(ring, ulysses)
    with fake_ranks(ring * ulysses):
        with_kernel = cpu_us(layer(ring, ulysses), repeats)
        with patch.object(core, "choose_kernel", lambda *_: NoKernel()):
            without = cpu_us(layer(ring, ulysses), repeats)
    mesh = f"{ring}x{ulysses}"
    return {"mesh": mesh, **asdict(counts), "cpu_us": without, "cpu_with_kernel_us": with_kernel}


def predict(rows: list[dict[str, Any]]) -> None:
    """The cost of each mesh if a step of the ring and an exchange of heads cost what they do on two ranks."""
    by_mesh = {row["mesh"]: row for row in rows}
    for name in ("operators", "cpu_us"):
        alone, heads, step = (by_mesh[mesh][name] for mesh in SMALLEST)
        for row in rows:
            ring, ulysses = (int(degree) for degree in row["mesh"].split("x"))
            row[f"predicted_{name}"] = alone + (ulysses > 1) * (heads - alone) + (ring - 1) * (step - alone)


def as_table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = {
        "mesh": "ring x ulysses",
        "own_calls": "Python calls of hf_usp",
        "calls": "all Python calls",
        "operators": "operators",
        "predicted_operators": "predicted",
        "messages": "messages",
        "all_to_alls": "all-to-alls",
        "cpu_us": "CPU without kernels, us",
        "predicted_cpu_us": "predicted",
        "cpu_with_kernel_us": "CPU with cpu_flash, us",
    }
    cells = [[f"{x:.0f}" if isinstance(x, float) else str(x) for x in (row[k] for k in head)] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(head.values()), ["---"] * len(head), *cells])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meshes", nargs="+", default=MESHES, help="ring x ulysses, as in 8x1")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    degrees = [[int(degree) for degree in mesh.split("x")] for mesh in dict.fromkeys([*SMALLEST, *args.meshes])]
    rows = [measure(ring, ulysses, args.repeats) for ring, ulysses in degrees]
    predict(rows)
    command = f"python benchmarks/host_cost.py --repeats {args.repeats} --meshes {' '.join(args.meshes)}"
    notes = machine_notes(command)
    sizes = f"{TOKENS} tokens a rank, {HEADS} query and {KV_HEADS} kv heads of width {WIDTH}, fp32, causal"
    text = "\n\n".join(["# Host cost of an attention call", *notes.values(), sizes, as_table(rows)])
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"host_cost-{date.today().isoformat()}"
    stem.with_suffix(".md").write_text(text + "\n")
    stem.with_suffix(".json").write_text(json.dumps({**notes, "sizes": sizes, "rows": rows}, indent=1))
    print(f"{text}\n\nwritten to {stem}.md and .json")


if __name__ == "__main__":
    main()
