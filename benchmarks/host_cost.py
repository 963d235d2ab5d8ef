"""The host cost of an attention call, forward and backward: Python calls, operators, messages and CPU time of a layer.

    python benchmarks/host_cost.py                      # nine meshes, a minute
    python benchmarks/host_cost.py --meshes 1x2 8x1 --repeats 20

One process stands for rank 0 of every mesh: torch's fake process group takes messages and delivers nothing. Tensors
are tiny, so what is left is what the host does for a layer of any size. "Without kernels": the kernel is replaced by
one that returns zeros; on a GPU the launches of the real one come on top. The prediction is computed from the counts:
each operator, message and all-to-all costs what a loop over one of them costs here, each Python call what an empty
function costs. Writes results/host_cost-<date>.json and .md.
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

MESHES = ["1x1", "1x2", "2x1", "2x2", "1x8", "4x1", "8x1", "4x4", "8x8"]
HEADS, KV_HEADS, WIDTH, TOKENS = 8, 8, 16, 16
PACKAGE = str(Path(hf_usp.__file__).parent)


@dataclass
class HostCounts:
    """What the host did for one layer; these repeat.

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


def cpu_us(step: Callable[[], Any], repeats: int, number: int = 1) -> float:
    """CPU time of one of `number` calls of a step, in microseconds; the smallest of several."""
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        for _ in range(20):
            step()
        times.append((time.process_time() - begun) / (20 * number) * 1e6)
    return min(times)


def unit_costs(repeats: int) -> dict[str, float]:
    """Microseconds of one of each thing that is counted, here."""
    x, y, many = torch.zeros(16, 8, 16), torch.zeros(16, 8, 16), range(50)

    def nothing() -> None:
        pass

    def call() -> None:
        for _ in many:
            nothing()

    def operator() -> None:  # two views for each operator that computes, as in a ring
        for _ in many:
            x[2:].add_(y.narrow(0, 2, 14))

    with fake_ranks(4):
        group = dist.group.WORLD
        sizes = [x.numel() // 4] * 4
        flat = x.view(-1)

        def message() -> None:
            for work in dist.batch_isend_irecv(
                [dist.P2POp(dist.isend, x, 1, group), dist.P2POp(dist.irecv, y, 3, group)]
            ):
                work.wait()

        def all_to_all() -> None:
            dist.all_to_all_single(torch.empty_like(flat), flat, sizes, sizes, group=group)

        return {
            "calls": cpu_us(call, repeats, len(many)),
            "operators": cpu_us(operator, repeats, 3 * len(many)),
            "messages": cpu_us(message, repeats),
            "all_to_alls": cpu_us(all_to_all, repeats),
        }


def measure(ring: int, ulysses: int, repeats: int, units: dict[str, float]) -> dict[str, Any]:
    """Counts and CPU time of a layer on one mesh."""
    counts = counts_of(ring, ulysses)
    with fake_ranks(ring * ulysses):
        step = layer(ring, ulysses)
        whole = cpu_us(step, repeats)
        with patch.object(core, "choose_kernel", lambda *_: NoKernel()):
            bare = cpu_us(layer(ring, ulysses), repeats)
    # Calls of torch inside messages are part of the cost of a message.
    predicted = sum(getattr(counts, name) * units[name] for name in ("operators", "messages", "all_to_alls"))
    predicted += counts.own_calls * units["calls"]
    return {
        "mesh": f"{ring}x{ulysses}",
        **asdict(counts),
        "predicted_us": predicted,
        "cpu_us": bare,
        "cpu_with_kernel_us": whole,
    }


def as_table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = {
        "mesh": "ring x ulysses",
        "own_calls": "Python calls of hf_usp",
        "calls": "all Python calls",
        "operators": "operators",
        "messages": "messages",
        "all_to_alls": "all-to-alls",
        "predicted_us": "predicted without kernels, us",
        "cpu_us": "CPU without kernels, us",
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
    units = unit_costs(args.repeats)
    degrees = [[int(degree) for degree in mesh.split("x")] for mesh in args.meshes]
    rows = [measure(ring, ulysses, args.repeats, units) for ring, ulysses in degrees]
    command = f"python benchmarks/host_cost.py --repeats {args.repeats} --meshes {' '.join(args.meshes)}"
    notes = machine_notes(command)
    sizes = f"{TOKENS} tokens a rank, {HEADS} query and {KV_HEADS} kv heads of width {WIDTH}, fp32, causal"
    costs = ", ".join(f"{name} {value:.2f}" for name, value in units.items())
    text = "\n\n".join(
        ["# Host cost of an attention call", *notes.values(), sizes, f"Cost of one, us: {costs}", as_table(rows)]
    )
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"host_cost-{date.today().isoformat()}"
    stem.with_suffix(".md").write_text(text + "\n")
    stem.with_suffix(".json").write_text(json.dumps({**notes, "sizes": sizes, "units": units, "rows": rows}, indent=1))
    print(f"{text}\n\nwritten to {stem}.md and .json")


if __name__ == "__main__":
    main()
