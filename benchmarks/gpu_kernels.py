"""Parts of `gpu.py` about attention kernels: errors, rates, tiles, and a ring of virtual ranks on one device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_bench import PLANNED, Bench, both_ways, segments
from torch import Tensor
from virtual_ring import VirtualRing

from hf_usp.kernels import KERNELS, Softmax
from hf_usp.planner.hardware import WORKSPACES


def kernels_against_eager(bench: Bench) -> list[dict[str, Any]]:
    """Error of every kernel that runs here over that of eager in bf16, both against eager in fp32; predicted: 1."""
    rows, found = 512 if bench.small else 2048, []
    cases = {
        "causal": segments([0, rows], [0, rows], 0, bench.device),
        "full": segments([0, rows], [0, rows], -1, bench.device),
        "packed": segments([0, rows // 7, rows // 2, rows], [0, rows // 7, rows // 2, rows], 0, bench.device),
    }
    for case, what in cases.items():
        tensors = bench.tensors(rows)
        exact = both_ways("eager", [t.float() for t in tensors], what)
        plain = both_ways("eager", tensors, what)
        for name in bench.kernels():
            mine = both_ways(name, tensors, what)
            triples = zip(("out", "lse", "dq", "dk", "dv"), mine, plain, exact, strict=True)
            ratios = {n: _error(m, e) / max(_error(p, e), 1e-6) for n, m, p, e in triples}
            found.append({"kernel": name, "case": case, **ratios, "predicted, at most": 2.0})
    return found


def _error(value: Tensor, exact: Tensor) -> float:
    return float((value.float() - exact).norm() / exact.norm())


def rates(bench: Bench) -> list[dict[str, Any]]:
    """TFLOP/s of long tiles, kernel by kernel, beside the planner's rate (`hf_usp.planner.hardware`)."""
    found = []
    for name in bench.kernels():
        last = 0.0
        for rows in (256, 512) if bench.small else (8192, 32768, 131072):
            # Four times the length is sixteen times the work; a slow kernel is measured where it is short.
            if 16 * last * (bench.repeats + 1) > min(60.0, bench.left() - 20):
                break
            for tile, right in (("full", -1), ("causal", 0)):
                measured = tile_seconds(bench, rows, rows, right, name)
                last = max(last, measured["backward"])
                for way, share in (("forward", 4), ("backward", 10)):
                    flops = share * bench.heads * bench.width * rows * rows / (1 if right else 2)
                    planned = planned_seconds(bench, name, flops, rows, right == 0, way == "backward")
                    found.append(
                        {
                            "kernel": name,
                            "rows": rows,
                            "tile": tile,
                            "way": way,
                            "tflops": flops / measured[way] / 1e12,
                            "predicted": float("nan") if planned is None else flops / planned / 1e12,
                        }
                    )
    return found


def planned_seconds(bench: Bench, name: str, flops: float, rows: int, causal: bool, backward: bool) -> float | None:
    """The planner's seconds of a tile; None where it has no rate."""
    if bench.machine is None or PLANNED.get(name) not in bench.machine.kernels:
        return None
    return bench.machine.tile(flops, rows, rows * bench.heads, kernel=PLANNED[name], causal=causal, backward=backward)


def workspaces(bench: Bench) -> list[dict[str, Any]]:
    """Bytes that a kernel's call takes at its peak beside its results, over those of the queries; the planner's beside.

    It counts what the dtype's results do not show: sums in fp32, heads of keys and values expanded, copies.
    """
    found = []
    for name in bench.kernels():
        kernel, softmax = KERNELS[name], Softmax(bench.width**-0.5)
        for rows in (256,) if bench.small else (4096, 16384):
            q, k, v, dout = bench.tensors(rows)
            what = segments([0, rows], [0, rows], 0, bench.device)
            out, lse = kernel.forward(q, k, v, what, softmax)
            results = {"forward": (out, lse), "backward": (q, k, v)}
            steps: dict[str, Callable[[], Any]] = {
                "forward": partial(kernel.forward, q, k, v, what, softmax),
                "backward": partial(kernel.backward, dout, q, k, v, out, lse, what, softmax),
            }
            for way, step in steps.items():
                more = bench.bytes_more(step) - sum(x.nbytes for x in results[way])
                row = {"kernel": name, "rows": rows, "way": way, "bytes over queries": more / q.nbytes}
                planned = WORKSPACES.get(PLANNED.get(name, ""))
                shared_by = bench.heads / bench.kv_heads
                size = 0.0 if planned is None else planned.bytes(q.numel(), k.numel() + v.numel(), shared_by)
                row["predicted"] = float("nan") if planned is None else size * (way == "backward") / q.nbytes
                found.append(row)
    return found


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
                planned = _planned_share(bench, rows, shape, sizes[1], flops, way == "backward")
                found.append(
                    {
                        "rows": rows,
                        "tile": shape,
                        "way": way,
                        "tflops": rate,
                        "share of plain": share,
                        "predicted": planned,
                    }
                )
    return found


def _planned_share(bench: Bench, rows: int, shape: str, keys: int, flops: int, backward: bool) -> float:
    """The planner's time of one causal tile over that of a tile of the same area."""
    name, work = bench.kernel, flops * bench.heads * bench.width * rows * rows / 2
    whole = planned_seconds(bench, name, work, rows, True, backward)
    part = planned_seconds(bench, name, work, keys, shape == "causal", backward)
    return float("nan") if whole is None or part is None else whole / part


def tile_seconds(bench: Bench, q_rows: int, k_rows: int, right: int, name: str | None = None) -> dict[str, float]:
    """One call of a kernel, by default the chosen one, forward and backward."""
    what = segments([0, q_rows], [0, k_rows], right, bench.device)
    softmax, kernel = Softmax(bench.width**-0.5), KERNELS[name or bench.kernel]
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
                    "predicted, at least": {"causal": 0.95, "packed": 0.90}[case],
                    "difference": error,
                }
            )
    return found
