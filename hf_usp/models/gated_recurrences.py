"""Recurrences that are a method of their module (RG-LRU of RecurrentGemma), on a sharded sequence.

`recurrent_layers` finds kernels by the names of functions. Here the recurrence is a gated sum for each
channel, and the convolution before it a module. Channels are exchanged for tokens (`recurrent.scan`), as heads are.

Shape suffixes: B rows, L tokens of a row on this rank, N rows of M tokens (documents), C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..batch.context import ForwardContext
from ..batch.documents import is_left_padded
from ..batch.sharded_tensors import context_of
from ..compat import RG_LRU_SCAN
from ..errors import UspModelError
from ..recurrent.scan import causal_conv, scan_over_heads
from .pickling import NotSaved
from .unsharded import refuse_unsharded


class GatedRecurrences(NotSaved):
    """The layers of one prepared model whose recurrence is a method, and the context that they are part of."""

    def __init__(self, model: nn.Module) -> None:
        self.context: ForwardContext | None = None
        self.layers: list[Any] = [m for m in model.modules() if hasattr(getattr(m, "rg_lru", None), RG_LRU_SCAN)]
        for layer in self.layers:
            scan, conv = layer.rg_lru, layer.conv_1d
            stock = getattr(type(scan), RG_LRU_SCAN)
            setattr(scan, RG_LRU_SCAN, MethodType(_Replacement(self, stock, RG_LRU_SCAN, _scan), scan))
            conv.forward = MethodType(_Replacement(self, type(conv).forward, "forward", _conv), conv)
        self.handles = [layer.register_forward_pre_hook(self._enter, with_kwargs=True) for layer in self.layers]

    def release(self) -> None:
        for handle in self.handles:
            handle.remove()
        for layer in self.layers:
            delattr(layer.rg_lru, RG_LRU_SCAN)
            del layer.conv_1d.forward
        self.layers = []

    def validate_batch(self, batch: Mapping[str, Any]) -> None:
        """Refuse left padding: pads run through the recurrence, and nothing hides them from it."""
        if self.layers and is_left_padded(batch.get("attention_mask")):
            raise UspModelError(
                f"left padding for {type(self.layers[0]).__name__}, through whose recurrence pads flow into tokens",
                rule="a sharded run equals one process, where what pads hold differs between eager and sdpa attention",
                remedy="pad on the right",
            )

    @torch.compiler.disable
    def _enter(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.context = context_of(*args, *kwargs.values())
        if self.context is None:
            refuse_unsharded(layer)
        else:
            self.context.recurrent_calls += 1


class _Replacement(NotSaved):
    """A method of a layer: sharded in a sharded forward, else what it was."""

    def __init__(
        self, owner: GatedRecurrences, original: Callable[..., Any], name: str, sharded: Callable[..., Any]
    ) -> None:
        self.owner, self.original, self.__name__, self.sharded = owner, original, name, sharded

    @torch.compiler.disable
    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        context = self.owner.context
        if context is None:
            return self.original(module, *args, **kwargs)
        return self.sharded(lambda *a, **k: self.original(module, *a, **k), module, context, *args, **kwargs)


def _conv(original: Callable[..., Any], conv: Any, context: ForwardContext, x_BCL: Tensor) -> Tensor:
    """A convolution module that pads both ends, of whose results the first L count."""
    return causal_conv(lambda x: original(x)[..., : x.shape[-1]], x_BCL, conv.kernel_size[0] - 1, context.layout)


def _scan(
    original: Callable[..., Any],
    module: nn.Module,
    context: ForwardContext,
    hidden_states: Tensor,
    recurrent_gate: Tensor,
    reset: Tensor,
    recurrent_states: None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """hidden_states, recurrent_gate [B, L, C], reset [B, L, 1] -> [B, L, C]; a channel is a head."""

    def kernel(heads: Mapping[str, Tensor], groups: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Tensor:
        x_NMC = heads["x"]
        never = torch.zeros_like(x_NMC[..., :1], dtype=torch.bool)
        out: Tensor = original(x_NMC, heads["gate"], never, None, **kwargs)[0]
        return out[..., None]

    heads = {"x": hidden_states, "gate": recurrent_gate * ~reset}
    return scan_over_heads(kernel, context.layout, heads, {}, {}, 1).squeeze(-1), None
