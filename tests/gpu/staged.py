"""Processes that share one device: a process group whose messages go through CPU memory, by gloo.

NCCL wants a device for every process and gloo sends no tensors of a GPU. Here every operation of hf_usp, DDP and ZeRO
copies what it sends to CPU memory and what arrives back to the device. Nothing is fast; all else is the real thing. It
works for tensors in CPU memory as well, so what uses it is rehearsed without a GPU.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ranks import Ranks

TIMEOUT = timedelta(seconds=60)


class Arriving(dist._Work):  # type: ignore[name-defined,misc]
    """A transfer of gloo's, after which `finish` brings what arrived to the device."""

    def __init__(self, work: Any, result: Any, finish: Callable[[], None]) -> None:
        super().__init__()
        self.work, self.result_, self.finish, self.future = work, result, finish, torch.futures.Future()

    def wait(self, timeout: Any = None) -> bool:
        if not self.future.done():
            self.work.wait()
            self.finish()
            self.future.set_result(self.result_)
        return True

    def is_completed(self) -> bool:
        return self.future.done() or self.work.is_completed()

    def result(self) -> Any:
        return self.result_

    def get_future(self) -> Any:
        self.wait()  # DDP and functional collectives ask for nothing else
        return self.future


class Staged(dist.ProcessGroup):
    """The operations of a process group, each by gloo between copies in CPU memory."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    @property
    def group_name(self) -> str:
        """As torch names the group; its own property knows only groups made in C++."""
        return dist.distributed_c10d._world.pg_names[self]

    def getBackendName(self) -> str:  # noqa: N802
        return "staged"

    def broadcast(self, tensors: list[Tensor], options: Any) -> Arriving:
        return self._in_place(tensors, lambda host: self.gloo.broadcast(host, options))

    def allreduce(self, tensors: list[Tensor], options: Any) -> Arriving:
        return self._in_place(tensors, lambda host: self.gloo.allreduce(host, options))

    def reduce(self, tensors: list[Tensor], options: Any) -> Arriving:
        return self._in_place(tensors, lambda host: self.gloo.reduce(host, options))

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Arriving:
        host = [x.cpu() for x in tensors]
        return Arriving(self.gloo.send(host, peer, tag), tensors, host.clear)

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> Arriving:
        return self._in_place(tensors, lambda host: self.gloo.recv(host, peer, tag))

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any = None) -> Arriving:
        host = [[_beside(x) for x in row] for row in outputs]
        work = self.gloo.allgather(host, [x.cpu() for x in inputs])
        return Arriving(
            work, outputs, lambda: _bring([x for row in outputs for x in row], [x for r in host for x in r])
        )

    def _allgather_base(self, output: Tensor, input: Tensor, options: Any = None) -> Arriving:
        return self._into(output, lambda host: self.gloo._allgather_base(host, input.cpu()))

    def _reduce_scatter_base(self, output: Tensor, input: Tensor, options: Any) -> Arriving:
        return self._into(output, lambda host: self.gloo._reduce_scatter_base(host, input.cpu(), options))

    def alltoall_base(
        self, output: Tensor, input: Tensor, arriving: list[int], leaving: list[int], options: Any = None
    ) -> Arriving:
        return self._into(output, lambda host: self.gloo.alltoall_base(host, input.cpu(), arriving, leaving))

    # Their names in torch 2.13.
    all_gather_single, reduce_scatter_single, all_to_all_single = _allgather_base, _reduce_scatter_base, alltoall_base

    def barrier(self, opts: Any = None) -> Arriving:
        return Arriving(self.gloo.barrier(), None, lambda: None)

    def _in_place(self, tensors: list[Tensor], start: Callable[[list[Tensor]], Any]) -> Arriving:
        host = [x.cpu() if x.device.type != "cpu" else x.contiguous() for x in tensors]
        return Arriving(start(host), tensors, lambda: _bring(tensors, host))

    def _into(self, output: Tensor, start: Callable[[Tensor], Any]) -> Arriving:
        host = _beside(output)
        return Arriving(start(host), output, lambda: _bring([output], [host]))


def _beside(tensor: Tensor) -> Tensor:
    """CPU memory for what arrives."""
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _bring(tensors: Sequence[Tensor], host: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for tensor, arrived in zip(tensors, host, strict=True):
            if tensor is not arrived:
                tensor.copy_(arrived)


def share_device(device: str, store: str) -> None:
    """In every process of a pool (`tests/ranks.py`): from now on one group over processes that share a device."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    if device == "cuda":
        # Accelerate and torch choose the device by it. Warnings of a GPU's software are not ours to end a check by.
        os.environ["LOCAL_RANK"] = "0"
        os.environ.pop("ACCELERATE_USE_CPU", None)
        warnings.simplefilter("default")
        torch.cuda.set_device(0)
    if "STAGED" not in dist.Backend._plugins:
        dist.Backend.register_backend("staged", Staged, devices=["cpu", "cuda"])
    dist.init_process_group("staged", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=TIMEOUT)


class Sharing:
    """A pool of processes that share a device; one started anew after a failure shares it, too."""

    def __init__(self, ranks: Ranks, device: str, folder: Path) -> None:
        self.ranks, self.device, self.folder, self.starts = ranks, device, folder, 0

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """As `Ranks.run`."""
        if not self.ranks.alive:
            self.starts += 1
            self.ranks.run(share_device, self.device, str(self.folder / f"store{self.starts}"))
        return self.ranks.run(function, *args)
