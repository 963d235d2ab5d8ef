"""Shared by the parts of `gpu.py`: the device with its clock and its meter of memory, and calls of single kernels."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_usp.kernels import KERNELS, Request, Segments, Softmax, choose_kernel
from hf_usp.planner.hardware import MACHINES, Machine, recognised
from hf_usp.tools.live_bytes import LiveBytes

HEADS, KV_HEADS, WIDTH = 32, 8, 128
# Names of the planner for kernels of the registry.
PLANNED = {"flash_attn": "fa2", "cuda_flash": "fa2", "fa3": "fa3", "fa4": "fa4", "cudnn": "cudnn", "cpu_flash": "cpu"}


class Bench:
    """The device, the sizes, and the clock."""

    def __init__(self, device: str, small: bool, minutes: float) -> None:
        self.device, self.small = torch.device(device), small
        self.machine: Machine | None
        self.heads, self.kv_heads, self.width = (4, 2, 64) if small else (HEADS, KV_HEADS, WIDTH)
        self.repeats = 1 if small else 5
        self.end = time.monotonic() + 60 * minutes
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        preset = "cpu" if name == "cpu" else recognised(name)
        # Unknown to the planner: there is nothing to predict seconds from.
        self.name, self.machine = name, None if preset is None else MACHINES[preset]
        self.kernel = choose_kernel(self.device, torch.bfloat16, self.width, Softmax(1.0)).name

    def left(self) -> float:
        """Seconds left."""
        return self.end - time.monotonic()

    def kernels(self) -> list[str]:
        """Kernels that run here in bf16, the one that is chosen first; eager is the measure of the others."""
        request = Request(self.device, torch.bfloat16, self.width, self.width, Softmax(1.0))
        usable = [n for n, k in KERNELS.items() if n != "eager" and k.why_not(request) is None]
        return sorted(usable, key=lambda n: n != self.kernel)

    def bytes_more(self, step: Callable[[], Any]) -> int:
        """Bytes that a call allocates at its peak over what there was; its results included."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            return torch.cuda.max_memory_allocated() - before
        with LiveBytes(inventory=False) as live:
            step()
        return live.peak

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
