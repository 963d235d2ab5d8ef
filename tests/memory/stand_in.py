"""A device that is not there: tensors go to host memory and back on a CPU, and what waits for what is written down."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_usp.memory.offloader import ActivationOffloader, OffloadedTensor
from hf_usp.tools.live_bytes import LiveBytes


class Streams:
    """In the place of `torch.cuda`: writes down what waits for what."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def Stream(self, device: Any) -> FakeStream:  # noqa: N802
        return FakeStream("ours", self.log)

    def current_stream(self, device: Any) -> FakeStream:
        return FakeStream("current", self.log)

    @contextmanager
    def stream(self, stream: FakeStream) -> Any:
        self.log.append(f"on {stream.name}")
        yield
        self.log.append("off")


class FakeStream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> FakeEvent:
        return FakeEvent(self.log)


class FakeEvent:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def synchronize(self) -> None:
        self.log.append("a copy is done")


class Recorded(Tensor):
    """A tensor of the stand-in device."""

    def record_stream(self, stream: Any) -> None:
        stream.log.append(f"used on {stream.name}")


class StandIn(ActivationOffloader):
    """Takes CPU memory for the memory of a device; an offloaded tensor's copy in the arena is all that is left of it.

    live: counts the bytes of the device, to which the arena does not belong.
    """

    def __init__(self, folder: str | None = None, live: LiveBytes | None = None) -> None:
        super().__init__(folder)
        self.live = live
        self.fake, self.shapes, self.alive, self.most = Streams(), [], 0, 0

    def is_far(self, tensor: Tensor) -> bool:
        return tensor.is_floating_point() and tensor.numel() > 0  # torch 2.11 saves an empty tensor of the CPU as well

    def module(self, device: torch.device) -> Any:
        return self.fake

    def offload(self, tensor: Tensor) -> Any:
        return super().offload(tensor.as_subclass(Recorded))

    def buffer(self, tensor: Tensor) -> Tensor:
        self.shapes.append(tuple(tensor.shape))
        host = super().buffer(tensor)
        if self.live is not None:
            self.live.leave_out(host)
        return host

    def copy_back(self, offloaded: OffloadedTensor) -> Tensor:
        self.alive += 1
        self.most = max(self.most, self.alive)
        return offloaded.host.clone().as_subclass(Recorded)

    def fetch(self, offloaded: Any) -> Tensor:
        tensor = super().fetch(offloaded)
        self.alive -= not isinstance(offloaded, Tensor)
        return tensor.as_subclass(Tensor)
