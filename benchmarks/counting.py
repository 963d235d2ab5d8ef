"""Work of an attention call, counted: bytes on the wire, messages, launched mask area, copies, saved bytes, CPU time.

Wall time on shared cores is noise; these figures repeat. Counted per rank, forward and backward apart.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_usp.tools.live_bytes import LiveBytes

COPIES = {"clone", "copy_", "cat", "stack", "_to_copy", "index_select", "repeat_interleave"}


@dataclass
class Counts:
    """Of one rank. Without a suffix: of the forward."""

    wire_forward: int = 0
    wire_backward: int = 0
    all_to_alls: int = 0
    all_to_alls_backward: int = 0
    messages: int = 0
    messages_backward: int = 0
    collectives: int = 0
    collectives_backward: int = 0
    area: int = 0
    area_backward: int = 0
    copied: int = 0
    copied_backward: int = 0
    saved: int = 0
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def wire_bytes() -> int:
    """Bytes that this process has written so far, sockets included (Linux)."""
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("wchar"))


class Watch(TorchDispatchMode):
    """Sees every operator, also inside the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.area = 0
        self.copied = 0

    @property
    def collectives(self) -> int:
        """Operations of a whole group: all but sends, receives, waits and barriers."""
        return sum(n for name, n in self.calls.items() if name not in ("send", "recv_", "wait_tensor", "barrier"))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if name.startswith(("c10d.", "_c10d_functional.")):
            self.calls[name.split(".")[1]] += 1
        elif "scaled_dot_product_flash" in name:
            # q, k, v, dropout, causal; backward: dout, q, k, v, out, lse, dropout, causal. Defaults are left out.
            first, flag = (1, 7) if "backward" in name else (0, 4)
            q, k = args[first], args[first + 1]
            rows, keys = q.shape[-2], k.shape[-2]
            causal = len(args) > flag and args[flag]
            # A causal call is a square: its upper triangle is not computed.
            self.area += q.shape[1] * (rows * (rows + 1) // 2 if causal else rows * keys)
        elif name.split(".")[1] in COPIES and isinstance(result, Tensor):
            self.copied += result.numel() * result.element_size()
        return result


class _Handle:
    """A transfer under way, whose `wait` looks whether anything was computed meanwhile."""

    def __init__(self, work: Any, transfers: Transfers, first: bool) -> None:
        self._work, self._transfers, self._first, self._begun = work, transfers, first, transfers.tiles

    def wait(self, *args: Any) -> Any:
        if self._first:
            self._transfers.exposed += self._begun == self._transfers.tiles
            self._first = False
        return self._work.wait(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class Transfers(TorchDispatchMode):
    """Point-to-point batches and functional collectives: how many, and for how many the rank just waited."""

    def __init__(self) -> None:
        super().__init__()
        self.hops = self.exposed = self.tiles = 0
        self._begun: list[int] = []

    @property
    def unseen(self) -> bool:
        """Whether waiting happened where no operator shows it."""
        return bool(self._begun)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = str(func)
        self.tiles += "scaled_dot_product" in name or ".bmm" in name or ".mm" in name
        if name.startswith("_c10d_functional.") and "wait_tensor" not in name:
            self.hops += 1
            self._begun.append(self.tiles)
        elif "wait_tensor" in name and self._begun:
            self.exposed += self._begun.pop(0) == self.tiles
        return func(*args, **(kwargs or {}))

    def batch(self, issue: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        """`batch_isend_irecv` with handles that are watched."""

        def issue_and_watch(operations: list[Any]) -> list[Any]:
            self.hops += 1
            return [_Handle(work, self, i == 0) for i, work in enumerate(issue(operations))]

        return issue_and_watch


@contextmanager
def watched_transfers() -> Iterator[Transfers]:
    """Watch all transfers of this process inside the block."""
    transfers, issue = Transfers(), dist.batch_isend_irecv
    dist.batch_isend_irecv = transfers.batch(issue)
    try:
        with transfers:
            yield transfers
    finally:
        dist.batch_isend_irecv = issue


# Largest number of bytes of tensors alive at once, of those made while it watches.
Peak = partial(LiveBytes, inventory=False)


def count(step: Callable[[], Tensor], gradient: Tensor, repeats: int) -> Counts:
    """Counts of one forward (`step`) and backward; CPU and wall time are the smallest of `repeats`."""
    counts = Counts()
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    step().backward(gradient)  # plans are made, buffers are warm
    _settle()
    before = wire_bytes()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), Watch() as watch:
        out = step()
    _settle()
    counts.wire_forward = wire_bytes() - before
    counts.saved, counts.copied, counts.area = sum(saved.values()), watch.copied, watch.area
    counts.all_to_alls = watch.calls["alltoall_base_"]
    counts.messages, counts.collectives = watch.calls["send"], watch.collectives
    before = wire_bytes()
    with Watch() as watch:
        out.backward(gradient)
    _settle()
    counts.wire_backward = wire_bytes() - before
    counts.copied_backward, counts.area_backward = watch.copied, watch.area
    counts.all_to_alls_backward = watch.calls["alltoall_base_"]
    counts.messages_backward, counts.collectives_backward = watch.calls["send"], watch.collectives
    times = []
    for _ in range(repeats):
        cpu, wall = time.process_time(), time.perf_counter()
        step().backward(gradient)
        times.append((time.process_time() - cpu, time.perf_counter() - wall))
        _settle()
    if times:
        counts.cpu_seconds, counts.wall_seconds = (min(t[i] for t in times) for i in (0, 1))
    return counts


def _settle() -> None:
    """Wait for the other ranks, and for gloo's threads to have written what they had to."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
        time.sleep(0.05)
