"""Tensors of the device in host memory, moved there and back beside the computation.

A range of host memory may be handed out again while copies from it are under way: our stream alone writes there, after
all that it and the computation have begun.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batch.context import ForwardContext
from ..compat import storage_identity
from ..distributed.comm import all_gather
from ..distributed.failures import on_every_rank
from ..errors import UspConfigError
from .host_arena import HostArena

IN_FLIGHT = 2  # copies to host memory; what they read stays on the device until they are done


@dataclass(eq=False)
class OffloadedTensor:
    """A tensor that is kept in host memory.

    Attributes:
        host: the copy.
        device: device that it came from.
        before: the tensor that was offloaded before it, and is needed after it.
        fetched: the copy on the device, once fetched.
    """

    host: Tensor
    device: torch.device
    before: OffloadedTensor | None
    fetched: Tensor | None = None


class ActivationOffloader:
    """Moves tensors to host memory and back, beside the computation. Tensors that are there already stay as they are.

    Args:
        folder: of the files behind the memory; None: memory alone.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.arena = HostArena(folder)
        self.last: weakref.ref[OffloadedTensor] | None = None  # the graph alone keeps it
        self.streams: dict[torch.device, Any] = {}
        self.layers = 0  # whose inputs will be offloaded; 0 once there is room
        self.agreed = 0  # bytes of the largest input for which the ranks have told each other that they have room
        self.started: dict[int, Tensor | OffloadedTensor] = {}  # by storage, until they are saved
        self.copies: deque[Any] = deque()  # events after copies to host memory

    def begin(self, layers: int) -> None:
        """A forward begins that will offload the inputs of so many layers."""
        self.last, self.layers = None, layers
        self.started.clear()

    def make_room(self, hidden: Tensor, context: ForwardContext | None, kept: Sequence[int] = ()) -> None:
        """Host memory for the inputs of all layers, before the first computes, and for `kept`: bytes of each tensor.

        Where inputs are larger than before, the ranks of the mesh tell each other.

        Raises:
            UspConfigError: a rank lacks the room.
        """
        if self.layers == 0 or not self.is_far(hidden):
            return
        layers, self.layers, problem = self.layers, 0, None
        try:
            self.arena.reserve([*[hidden.nbytes] * layers, *kept])
        except UspConfigError as found:
            problem = found
        group = None if context is None else context.layout.mesh.group
        if group is not None and hidden.nbytes > self.agreed:
            flag = torch.tensor([problem is not None], dtype=torch.int64, device=hidden.device)
            flags = all_gather(flag, group).flatten().tolist()
            if any(flags):
                raise on_every_rank(problem or _no_room_on(flags))
            self.agreed = hidden.nbytes
        if problem is not None:
            raise problem
        if hidden.device.type == "cuda":
            self.arena.lock()

    def offload(self, tensor: Tensor) -> Tensor | OffloadedTensor:
        """Start copying to host memory; the device's memory is free once the copy is done."""
        if not self.is_far(tensor):
            return tensor
        streams, stream = self._streams(tensor.device)
        if len(self.copies) == IN_FLIGHT:
            self.copies.popleft().synchronize()
        stream.wait_stream(streams.current_stream(tensor.device))  # what computes the tensor
        host = self.buffer(tensor)
        with streams.stream(stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
        self.copies.append(stream.record_event())
        offloaded = OffloadedTensor(host, tensor.device, None if self.last is None else self.last())
        self.last = weakref.ref(offloaded)
        return offloaded

    def start(self, tensor: Tensor) -> None:
        """Start to offload a tensor that will be saved for the backward, and is needed there in parts."""
        last = self.last
        self.started[storage_identity(tensor)] = self.offload(tensor)
        self.last = last  # nobody brings it back as a whole

    def take_started(self, tensor: Tensor) -> Tensor | OffloadedTensor:
        """The result of `start` for a tensor that is saved now."""
        started = self.started.pop(storage_identity(tensor))
        return tensor if isinstance(started, Tensor) else started

    def on_host(self, offloaded: Tensor | OffloadedTensor) -> Tensor:
        """The copy in host memory, for `parts`."""
        return offloaded if isinstance(offloaded, Tensor) else offloaded.host

    def parts(self, requests: Sequence[Sequence[Tensor]], device: torch.device) -> Iterator[list[Tensor]]:
        """Tensors, or parts of tensors, on the device; those of the next request come while the caller works.

        What is in host memory is copied into one of two buffers: it may be read until the next request is asked for.
        """
        held = [self.is_on_host(x) for x in requests[0]]
        if not any(held):
            yield from map(list, requests)
            return
        streams, stream = self._streams(device)
        columns = list(zip(*requests, strict=True))
        slots = [[_buffer(x, device) if far else None for x, far in zip(columns, held, strict=True)] for _ in (0, 1)]
        coming: list[Tensor] = []
        for i in range(len(requests) + 1):
            arrived, current = coming, streams.current_stream(device)
            current.wait_stream(stream)
            if i < len(requests):
                stream.wait_stream(current)  # what read the buffer
                with streams.stream(stream):
                    pairs = zip(requests[i], slots[i % 2], strict=True)
                    coming = [x if buffer is None else _copied(x, buffer) for x, buffer in pairs]
            elif i > 1:
                slots[i % 2] = []  # of the part before the last one
            if i > 0:
                yield arrived

    def fetch(self, offloaded: Tensor | OffloadedTensor) -> Tensor:
        """The tensor on its device, and the one before it on its way there."""
        if isinstance(offloaded, Tensor):
            return offloaded
        streams, stream = self._streams(offloaded.device)
        tensor = self._bring(offloaded)
        current = streams.current_stream(offloaded.device)
        current.wait_stream(stream)
        tensor.record_stream(current)
        if offloaded.before is not None and offloaded.before.fetched is None:
            self._bring(offloaded.before)
        offloaded.before, offloaded.fetched = None, None
        return tensor

    def _bring(self, offloaded: OffloadedTensor) -> Tensor:
        """On the same stream as the copy out, so after it."""
        if offloaded.fetched is None:
            streams, stream = self._streams(offloaded.device)
            with streams.stream(stream):
                offloaded.fetched = self.copy_back(offloaded)
        return offloaded.fetched

    def _streams(self, device: torch.device) -> tuple[Any, Any]:
        """The module that has the device's streams (torch.cuda), and ours."""
        module = self.module(device)
        if device not in self.streams:
            self.streams[device] = module.Stream(device)
        return module, self.streams[device]

    # A test without such a device puts others in the place of these.

    def is_far(self, tensor: Tensor) -> bool:
        """Whether a tensor is outside CPU memory."""
        return tensor.device.type != "cpu"

    def is_on_host(self, tensor: Tensor) -> bool:
        """Whether a tensor, or what it is a part of, was offloaded."""
        return self.arena.holds(tensor)

    def module(self, device: torch.device) -> Any:
        """`torch.cuda` and the like."""
        return torch.get_device_module(device)

    def buffer(self, tensor: Tensor) -> Tensor:
        """Host memory for a copy."""
        return self.arena.empty(tensor.shape, tensor.dtype)

    def copy_back(self, offloaded: OffloadedTensor) -> Tensor:
        """A copy on the device, on its way."""
        return offloaded.host.to(offloaded.device, non_blocking=True)


def _buffer(column: Sequence[Tensor], device: torch.device) -> Tensor:
    """Room for any of some tensors."""
    return torch.empty(max(x.numel() for x in column), dtype=column[0].dtype, device=device)


def _copied(x: Tensor, buffer: Tensor) -> Tensor:
    found = buffer[: x.numel()].view(x.shape)
    for to, row in [(found, x)] if x.is_contiguous() else zip(found, x, strict=True):  # page-locked, if contiguous
        to.copy_(row, non_blocking=True)
    return found


def _no_room_on(flags: list[int]) -> UspConfigError:
    return UspConfigError(
        f"no room in host memory on rank(s) {', '.join(str(i) for i, flag in enumerate(flags) if flag)} of the mesh",
        rule="every rank keeps the inputs of its layers there until the backward",
        remedy="solve what that rank reports, or leave out offload_checkpoints",
    )
