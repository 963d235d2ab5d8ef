"""Parts of `gpu.py` about the host: where it waits for the device, what it costs, streams and copies."""

from __future__ import annotations

import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_bench import Bench
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, LlamaForCausalLM

import hf_usp
from hf_usp.attention.messages import MessageBuffers
from hf_usp.batch.layout import MaskSpec, make_layout
from hf_usp.sharding.masks import Documents

LIBRARY = Path(hf_usp.__file__).parent
# A micro-batch with a padding mask: its documents, and on a mesh the agreement on the batch in the same copy. A tensor
# of num_items_in_batch adds its value (tests/batch/test_host_waits.py).
WAITS_OF_A_BATCH = 1


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


class HostWaits(TorchFunctionMode):
    """Counts calls of this library by which the host waits for values of the device.

    It sees them on any device: on CUDA each waits for all that was launched before.
    """

    WAITS = frozenset({"item", "tolist", "cpu", "nonzero", "__bool__", "__int__", "__float__", "unique", "equal"})

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.WAITS or (name == "where" and len(args) == 1):
            files = (Path(frame.f_code.co_filename) for frame, _ in traceback.walk_stack(None))
            place = next((f.relative_to(LIBRARY).as_posix() for f in files if f.is_relative_to(LIBRARY)), None)
            if place is not None:
                self.found[place] += 1
        return func(*args, **(kwargs or {}))


def host_waits(bench: Bench) -> list[dict[str, Any]]:
    """Waits of the host in one micro-batch of a tiny model of 2 and of 6 layers, after the first.

    On CUDA torch's own sync debug mode counts beside ours, copies from pageable memory included.
    """
    found = []
    for layers in (2, 6):
        step = tiny_step(bench.device, layers)
        step()
        step()
        with HostWaits() as ours:
            step()
        row: dict[str, Any] = {"layers": layers, "waits": ours.found.total()}
        if bench.device.type == "cuda":
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    step()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            seen = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
            row |= {
                "torch counts": sum(seen.values()),
                "torch's places": ", ".join(f"{p} x{n}" for p, n in seen.items()),
            }
        places = ", ".join(f"{place} x{n}" for place, n in ours.found.items())
        found.append(row | {"predicted": WAITS_OF_A_BATCH, "places": places})
    return found


def tiny_step(device: torch.device, layers: int) -> Callable[[], Any]:
    """Forward and backward of a Llama on a sharded batch of two rows, one padded; no result is read."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    with torch.device(device):
        model: Any = LlamaForCausalLM._from_config(config, attn_implementation="usp", dtype=torch.bfloat16).train()
    mesh = hf_usp.UspMesh.build(ring_degree=1, ulysses_degree=1)
    ids = torch.randint(0, 500, (2, 96), device=device)
    mask = torch.ones_like(ids)
    mask[1, 80:] = 0

    def step() -> None:
        batch = hf_usp.shard({"input_ids": ids, "labels": ids, "attention_mask": mask}, mesh)
        model(**batch).loss.backward()

    return step


def streams(bench: Bench) -> list[dict[str, Any]]:
    """Messages' memory when 60 are copied on a side stream while the host runs ahead: new memory, and a ring's buffers.

    torch gives a tensor that another stream used back only when the device is there (`record_stream`).
    """
    if bench.device.type != "cuda":
        return [{"buffers": "no streams on this device", "messages held": 0, "predicted": 0}]
    size, count, found = (1 << 20 if bench.small else 1 << 28), 60, []
    side = torch.cuda.Stream()
    slow = torch.randn(8192, 8192, device=bench.device)
    mesh = hf_usp.UspMesh(2, 1, 0, 0, (0, 1), None, None, None)  # messages of two rows
    work = make_layout(Documents.from_bounds([0, 4]), 1, 4, mesh).device_schedule(MaskSpec(), bench.device)
    for way in ("new ones", "a ring's"):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        source = torch.empty(2, size // 2, dtype=torch.uint8, device=bench.device)
        buffers, arrived = MessageBuffers(work), torch.cuda.Event()
        buffers.begin(source)
        for _ in range(count):
            slow = slow @ slow.T / 8192
            message = torch.empty_like(source) if way == "new ones" else buffers.take(2, size // 2, source)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                message.copy_(source)
                arrived.record()
            message.record_stream(side)
            torch.cuda.current_stream().wait_event(arrived)
            if way != "new ones":
                buffers.give(message)
            del message
        torch.cuda.synchronize()
        held = (torch.cuda.memory_reserved() - before) / size - 1
        found.append({"buffers": way, "messages held": held, "predicted": count if way == "new ones" else 1})
        del source, buffers
    return found


def copies(bench: Bench) -> list[dict[str, Any]]:
    """GB/s between the device and page-locked host memory, and seconds to lock it, beside the planner's rate."""
    size = 1 << 24 if bench.small else 1 << 32
    device = torch.empty(size, dtype=torch.uint8, device=bench.device)
    start = time.perf_counter()
    host = torch.empty(size, dtype=torch.uint8, pin_memory=bench.device.type == "cuda")
    locked = time.perf_counter() - start
    planned = float("nan") if bench.machine is None else bench.machine.host_bandwidth / 1e9
    ways = {
        "to the host": lambda: host.copy_(device, non_blocking=True),
        "back": lambda: device.copy_(host, non_blocking=True),
    }
    return [
        {
            "way": way,
            "GB/s": size / bench.seconds(step) / 1e9,
            "predicted, at least": planned,
            "seconds to lock": locked,
        }
        for way, step in ways.items()
    ]
