"""Activation checkpoints in CPU memory: inputs of checkpointed layers do not stay on the device.

With activation checkpointing a layer keeps its input alone, yet at 131,072 local tokens of width 4,096 that is 1 GiB a
layer in bf16. Here exactly these inputs go to pinned CPU memory while the next layers compute, on a stream of their
own, and come back in the backward, each fetched one layer before it is needed. Nothing else is moved: not what a policy
such as `hf_usp.save_attention_outputs` keeps, nor what is saved outside checkpointed layers.

A layer that computes in chunks (`tiled_layer.py`) is its own checkpoint. Its input comes back chunk by chunk.

It wraps whatever checkpointing function the layers have when a forward begins, of either kind, so it does not matter
who enabled it, and when.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from ..compat import checkpoint_function, checkpointing_name, find_hook_owner, set_checkpoint_function
from ..errors import UspModelError
from ..models.pickling import NotSaved
from .tiled_layer import tiled_layer

CHECKPOINTING = checkpointing_name()


@dataclass(eq=False)
class OffloadedTensor:
    """A tensor that is kept in CPU memory.

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
    """Moves tensors to CPU memory and back, beside the computation. Tensors that are there already stay as they are."""

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self.last: OffloadedTensor | None = None
        self.streams: dict[torch.device, Any] = {}

    def offload(self, tensor: Tensor) -> Tensor | OffloadedTensor:
        """Start copying to pinned memory; the device's memory is free once the copy is done."""
        if not self.is_far(tensor):
            return tensor
        streams, stream = self._streams(tensor.device)
        stream.wait_stream(streams.current_stream(tensor.device))  # what computes the tensor
        host = self.buffer(tensor)
        with streams.stream(stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
        self.last = OffloadedTensor(host, tensor.device, self.last)
        return self.last

    def offload_apart(self, tensor: Tensor) -> Tensor | OffloadedTensor:
        """The same for a tensor that is needed in parts: nobody brings it back as a whole."""
        last, offloaded = self.last, self.offload(tensor)
        self.last = last
        return offloaded

    def on_host(self, offloaded: Tensor | OffloadedTensor) -> Tensor:
        """The copy in CPU memory; what the current stream reads of it from now on is complete."""
        if isinstance(offloaded, Tensor):
            return offloaded
        streams, stream = self._streams(offloaded.device)
        streams.current_stream(offloaded.device).wait_stream(stream)
        return offloaded.host

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

    def module(self, device: torch.device) -> Any:
        """`torch.cuda` and the like."""
        return torch.get_device_module(device)

    def buffer(self, tensor: Tensor) -> Tensor:
        """Pinned memory for a copy."""
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)

    def copy_back(self, offloaded: OffloadedTensor) -> Tensor:
        """A copy on the device, on its way."""
        return offloaded.host.to(offloaded.device, non_blocking=True)


class Offloaded:
    """A checkpointing function whose saved inputs are offloaded; what the layer saves inside is its own affair."""

    def __init__(self, function: Callable[..., Any], offloader: ActivationOffloader) -> None:
        self.function, self.offloader = function, offloader

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The stock function; its own hooks are the inner ones."""
        with saved_tensors_hooks(self.offloader.offload, self.offloader.fetch):
            return self.function(*args, **kwargs)


class OffloadedCheckpoints(NotSaved):
    """The hook of one model."""

    def __init__(self, model: PreTrainedModel, offloader: ActivationOffloader) -> None:
        self.offloader = offloader
        self.handle = model.register_forward_pre_hook(self.begin)

    def begin(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """Before a forward in training: wrap the checkpointing function of every layer that has one."""
        if not (model.training and torch.is_grad_enabled()):
            return
        self.offloader.last = None
        tiled = [found for found in map(tiled_layer, model.modules()) if found is not None]
        for layer in tiled:
            layer.offloader = self.offloader
        layers: list[Any] = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
        if not layers and not tiled:
            raise UspModelError(
                f"offload_checkpoints with {type(model).__name__}, none of whose layers is checkpointed",
                rule="what is offloaded are the inputs of checkpointed layers, by Transformers' own checkpointing",
                remedy=f"TrainingArguments({CHECKPOINTING}=True), or model.{CHECKPOINTING}_enable()",
            )
        new = {checkpoint_function(layer) for layer in layers}
        new = {function for function in new if not isinstance(function, Offloaded)}
        if not all(_saves_to_outer_hooks(function) for function in new):
            raise UspModelError(
                f"offload_checkpoints with {type(model).__name__}, whose checkpointing moves inputs itself",
                rule="one of the two moves them: hooks nearer to a layer come first, and ours would move nothing",
                remedy=f"leave offload=True out of {CHECKPOINTING}_kwargs, or offload_checkpoints (which copies "
                "while layers compute)",
            )
        for layer in layers:
            function = checkpoint_function(layer)
            if function in new:
                set_checkpoint_function(layer, Offloaded(function, self.offloader))


def _saves_to_outer_hooks(function: Callable[..., Any]) -> bool:
    """Whether hooks around a checkpointing function get what it saves; `offload=True` of Transformers has its own."""
    saved: list[Tensor] = []
    with torch.enable_grad(), saved_tensors_hooks(saved.append, lambda _: saved[0]):
        function(torch.neg, torch.zeros(1, requires_grad=True))
    return bool(saved)


def offload_checkpoints(model: PreTrainedModel, offloader: ActivationOffloader | None = None) -> OffloadedCheckpoints:
    """Keep the inputs of a model's checkpointed layers in CPU memory until the backward. Again changes nothing."""
    return _offloaded(model) or OffloadedCheckpoints(model, offloader or ActivationOffloader())


def offloads_checkpoints(model: nn.Module) -> bool:
    """Whether `offload_checkpoints` was called for this model."""
    return _offloaded(model) is not None


def restore_checkpoints(model: nn.Module) -> None:
    """Undo `offload_checkpoints`."""
    hooks = _offloaded(model)
    if hooks is None:
        return
    hooks.handle.remove()
    for layer in model.modules():
        tiled = tiled_layer(layer)
        if tiled is not None:
            tiled.offloader = None
        function = checkpoint_function(layer)
        if isinstance(function, Offloaded):
            set_checkpoint_function(layer, function.function)


def _offloaded(model: nn.Module) -> OffloadedCheckpoints | None:
    return find_hook_owner(model, OffloadedCheckpoints)
