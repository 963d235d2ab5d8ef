"""Activation checkpoints in host memory: inputs of checkpointed layers do not stay on the device.

With activation checkpointing a layer keeps its input alone, yet at 131,072 local tokens of width 4,096 that is 1 GiB a
layer in bf16. Here exactly these inputs go to host memory (`host_arena.py`) while the next layers compute, on a stream
of their own, and come back in the backward, each fetched one layer before it is needed (`offloader.py`). Nothing else
is moved: not what a policy such as `hf_usp.save_attention_outputs` keeps, nor what is saved outside checkpointed
layers.

A layer that computes in chunks (`tiled_layer.py`) is its own checkpoint. Its input, and attention's output where that
is kept, come back part by part.

It wraps whatever checkpointing function the layers have when a forward begins, of either kind, so it does not matter
who enabled it, and when.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from ..batch.sharded_tensors import context_of
from ..compat import checkpoint_function, checkpointing_name, find_hook_owner, set_checkpoint_function
from ..errors import UspModelError
from ..models.pickling import NotSaved
from .offloader import ActivationOffloader
from .tiled_layer import tiled_layer

CHECKPOINTING = checkpointing_name()


class Offloaded:
    """A checkpointing function whose saved inputs are offloaded; what the layer saves inside is its own affair."""

    def __init__(self, function: Callable[..., Any], offloader: ActivationOffloader) -> None:
        self.function, self.offloader = function, offloader

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The stock function; its own hooks are the inner ones."""
        hidden = next((x for x in args if isinstance(x, Tensor)), None)
        if hidden is not None:
            keywords = getattr(args[0], "keywords", {})  # of the layer's forward
            self.offloader.make_room(hidden, context_of(*args[1:], *keywords.values(), *kwargs.values()))
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
        from transformers.modeling_layers import GradientCheckpointingLayer  # which loads every auto class

        tiled = [found for found in map(tiled_layer, model.modules()) if found is not None]
        for layer in tiled:
            layer.offloader = self.offloader
        layers: list[Any] = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
        whole = [layer for layer in layers if isinstance(layer, GradientCheckpointingLayer) and not tiled_layer(layer)]
        self.offloader.begin(len(tiled) + len(whole))
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
