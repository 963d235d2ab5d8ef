"""Inputs of checkpointed layers offloaded outside the device: exactly these, fetched in time, the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_usp
from hf_usp.memory.activation_offload import CHECKPOINTING, offload_checkpoints
from hf_usp.memory.offloader import ActivationOffloader

from ..harness import step
from ..tiny import batch_of, largest_difference, tiny_model
from .stand_in import StandIn


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
        assert (offloader.arena.size, offloader.arena.used) == (3 * 2 * 37 * 32 * 4, 0)


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
    offloader.fake.log.clear()
    offloader.offload(torch.zeros(2))
    assert offloader.fake.log == ["a copy is done", *out]  # at most two are on their way out


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
