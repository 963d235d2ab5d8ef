"""The phases of a simulated step, named by what runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import checkpoint_function, set_checkpoint_function
from ..memory import tiled_layer
from ..memory.layer_attention import LayerAttention
from ..utils.patches import AttributePatches
from .live_bytes import LiveBytes


class Phases:
    """Names the phases of a step by what runs: `forward`, `recompute` or `backward`, the layer and its part."""

    def __init__(self, model: Any, live: LiveBytes, patches: AttributePatches) -> None:
        from transformers.modeling_layers import GradientCheckpointingLayer

        self.live, self.backward = live, False
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self.places = {layer: index for index, layer in enumerate(layers)}
        patches.set(tiled_layer, "LayerAttention", self._named(tiled_layer.LayerAttention))
        for index, layer in enumerate(layers):
            if tiled_layer.tiled_layer(layer) is not None:
                continue
            function = checkpoint_function(layer)
            if function is not None:
                set_checkpoint_function(layer, partial(self._checkpoint, function))
            for name, part in layer.named_children():
                self._name(part, f"layer {index} {name}")
        norm, head = model.get_decoder().norm, model.get_output_embeddings()
        self._name(norm, "final norm")
        head.register_forward_pre_hook(lambda *_: self._enter("forward loss"))

    def _named(self, stock: type[LayerAttention]) -> type[LayerAttention]:
        """The same, with phases of a layer in chunks."""
        enter, places = self._enter, self.places

        class Named(stock):  # type: ignore[misc, valid-type]
            def _enter(self, part: str, again: str = "backward") -> None:
                enter(f"{again if watch.backward else 'forward'} layer {places[self.call.layer]} {part}")

            def forward(self, *args: Any) -> Any:
                self._enter("attention", again="recompute")
                return super().forward(*args)

            def backward(self, *args: Any) -> Any:
                self._enter("attention")
                return super().backward(*args)

            def after(self, *args: Any) -> Tensor:
                self._enter("after attention")
                return super().after(*args)

            def before(self, *args: Any) -> Any:
                if torch.is_grad_enabled():
                    self._enter("before attention")
                return super().before(*args)

        watch = self
        return Named

    def begin_backward(self) -> None:
        self.backward = True
        self._enter("backward loss")

    def _name(self, part: nn.Module, name: str) -> None:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if tensor.requires_grad and not self.backward:
                tensor.register_hook(lambda grad: self._enter(f"backward {name}"))

        part.register_forward_pre_hook(lambda *_: self._enter(f"{'recompute' if self.backward else 'forward'} {name}"))
        part.register_forward_hook(after)

    def _enter(self, phase: str) -> None:
        self.live.phase = phase

    def _checkpoint(self, function: Callable[..., Any], layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A layer that is recomputed interrupts a phase of the backward."""

        def run(*args: Any, **kwargs: Any) -> Any:
            interrupted = self.live.phase
            try:
                return layer(*args, **kwargs)
            finally:
                if self.backward:
                    self._enter(interrupted)

        return function(run, *args, **kwargs)
