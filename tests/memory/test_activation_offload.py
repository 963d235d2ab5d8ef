"""Inputs of checkpointed layers offloaded outside the device: exactly these, fetched in time, the same gradients."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_usp
from hf_usp.memory.activation_offload import CHECKPOINTING, ActivationOffloader, OffloadedTensor, offload_checkpoints

from ..harness import step
from ..tiny import batch_of, largest_difference, tiny_model


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


class Recorded(Tensor):
    """A tensor of the stand-in device."""

    def record_stream(self, stream: Any) -> None:
        stream.log.append(f"used on {stream.name}")


class StandIn(ActivationOffloader):
    """Takes CPU memory for the memory of a device; a offloaded tensor's copy is all that is left of it."""

    def __init__(self) -> None:
        super().__init__()
        self.fake, self.shapes, self.alive, self.most = Streams(), [], 0, 0

    def is_far(self, tensor: Tensor) -> bool:
        return tensor.is_floating_point() and tensor.numel() > 0  # torch 2.11 saves an empty tensor of the CPU as well

    def module(self, device: torch.device) -> Any:
        return self.fake

    def offload(self, tensor: Tensor) -> Any:
        return super().offload(tensor.as_subclass(Recorded))

    def buffer(self, tensor: Tensor) -> Tensor:
        self.shapes.append(tuple(tensor.shape))
        return torch.empty(tensor.shape, dtype=tensor.dtype)

    def copy_back(self, offloaded: OffloadedTensor) -> Tensor:
        self.alive += 1
        self.most = max(self.most, self.alive)
        return offloaded.host.clone().as_subclass(Recorded)

    def fetch(self, offloaded: Any) -> Tensor:
        tensor = super().fetch(offloaded)
        self.alive -= not isinstance(offloaded, Tensor)
        return tensor.as_subclass(Tensor)


def checkpointed(kind: str, **options: Any) -> Any:
    model = tiny_model(attention="usp" if kind == "save_attention_outputs" else "eager", num_hidden_layers=3).train()
    enable = getattr(model, f"{CHECKPOINTING}_enable")
    enable(
        hf_usp.save_attention_outputs() if kind == "save_attention_outputs" else {"use_reentrant": kind == "reentrant"},
        **options,
    )
    return model


@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant", "save_attention_outputs"])
def test_the_inputs_of_layers_go_and_come_and_nothing_else(kind: str) -> None:
    model, batch = checkpointed(kind), batch_of("plain")
    loss, gradients, _ = step(model, **batch)
    offloader = StandIn()
    offload_checkpoints(model, offloader)
    assert offload_checkpoints(model).offloader is offloader
    for _ in range(2):
        offloader.shapes.clear()
        mine, mine_gradients, _ = step(model, **batch)
        assert mine == loss
        assert largest_difference(mine_gradients, gradients) == 0
        assert offloader.shapes == [(2, 37, 32)] * 3
        # The next one is on its way while a layer computes; all have come back.
        assert (offloader.most, offloader.alive) == (2, 0)


def test_streams_wait_for_each_other() -> None:
    offloader = StandIn()
    first, second = (offloader.offload(torch.full((2,), value)) for value in (1.0, 2.0))
    out = ["ours waits for current", "on ours", "off", "used on ours"]
    assert offloader.fake.log == out + out
    offloader.fake.log.clear()
    assert offloader.fetch(second).tolist() == [2.0, 2.0]
    assert offloader.fake.log == ["on ours", "off", "current waits for ours", "used on current", "on ours", "off"]
    offloader.fake.log.clear()
    assert offloader.fetch(first).tolist() == [1.0, 1.0]
    assert offloader.fake.log == ["current waits for ours", "used on current"]  # it was on its way


def test_without_checkpointing_there_is_nothing_to_park() -> None:
    model = tiny_model(attention="eager")
    offload_checkpoints(model)
    with torch.no_grad():
        model(**batch_of("plain"))
    model.eval()(**batch_of("plain"))
    with pytest.raises(hf_usp.UspModelError, match=f"none of whose layers is checkpointed.*{CHECKPOINTING}=True"):
        model.train()(**batch_of("plain"))
    getattr(model, f"{CHECKPOINTING}_enable")()  # the remedy
    model(**batch_of("plain")).loss.backward()


def test_every_second_layer() -> None:
    model, batch = checkpointed("non_reentrant", every_n_layers=2), batch_of("plain")
    loss, gradients, _ = step(tiny_model(attention="eager", num_hidden_layers=3).train(), **batch)
    offloader = StandIn()
    offload_checkpoints(model, offloader)
    mine, mine_gradients, _ = step(model, **batch)
    assert mine == loss and largest_difference(mine_gradients, gradients) < 1e-7
    assert (offloader.shapes, offloader.alive) == ([(2, 37, 32)] * 2, 0)


@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant", "save_attention_outputs"])
def test_two_that_offload_are_one_too_many(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' own hooks are nearer to the layer: the option would do nothing."""
    monkeypatch.setattr(torch.cpu, "is_available", lambda: False)  # its copies are pinned, which needs a GPU
    model, offloader = checkpointed(kind, offload=True), StandIn()
    offload_checkpoints(model, offloader)
    with pytest.raises(hf_usp.UspModelError, match=f"leave offload=True out of {CHECKPOINTING}_kwargs"):
        model(**batch_of("plain"))
    getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": kind == "reentrant"})  # the remedy
    model(**batch_of("plain")).loss.backward()
    assert offloader.shapes == [(2, 37, 32)] * 3


def test_on_cpu_tensors_stay_where_they_are() -> None:
    tensor = torch.ones(3)
    offloader = ActivationOffloader()
    assert offloader.offload(tensor) is tensor is offloader.fetch(tensor)
