"""Lightning attention (MiniMax) on a sharded sequence: a recurrence in blocks, in the code of its own layer.

The state of a head decays by a constant each token, so heads are exchanged for tokens (`recurrent.scan`): the model's
own loop over blocks runs on whole documents for this rank's heads. A layer's forward does that between two projections.
A stand-in for the layer has these heads and no projections; the forward runs on it.

Source: Lightning Attention-2, arXiv 2401.04658.

Shape suffixes: B rows, L tokens of a row on this rank, N rows of M tokens (documents), H heads, h those of this rank, D
width of a head, X = 3 * D.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..batch.context import ForwardContext
from ..batch.sharded_tensors import context_of
from ..recurrent.scan import scan_over_heads
from .pickling import NotSaved
from .unsharded import refuse_unsharded

# Buffers with an entry per head, and where it stands.
PER_HEAD = {"slope_rate": 0, "query_decay": 0, "key_decay": 0, "diagonal_decay": 1}


def is_lightning_attention(module: nn.Module) -> bool:
    """Whether a module's own forward asks a cache for the state of a recurrence whose decays are its buffers."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    asks = code is not None and "get_linear_cache" in code.co_names
    return asks and all(isinstance(getattr(module, name, None), Tensor) for name in PER_HEAD)


class LightningAttention(NotSaved):
    """The layers of one prepared model with lightning attention."""

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[Any] = [module for module in model.modules() if is_lightning_attention(module)]
        for layer in self.layers:
            layer.forward = MethodType(_Sharded(type(layer).forward), layer)

    def release(self) -> None:
        for layer in self.layers:
            del layer.forward
        self.layers = []


class _Sharded(NotSaved):
    """The forward of a layer: sharded in a sharded forward, else what it was."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original, self.__name__, self.signature = original, "forward", inspect.signature(original)

    @torch.compiler.disable
    def __call__(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        context = context_of(*args, *kwargs.values())
        if context is None:
            refuse_unsharded(layer)
            return self.original(layer, *args, **kwargs)
        given = self.signature.bind(layer, *args, **kwargs).arguments
        return self._shard(layer, given["hidden_states"], given["attention_mask"], context), None

    def _shard(self, layer: Any, hidden_BLC: Tensor, mask_BL: Tensor | None, context: ForwardContext) -> Tensor:
        context.recurrent_calls += 1
        heads, width = layer.num_attention_heads, layer.head_dim
        qkv_BLHX = layer.act_fn(layer.qkv_proj(hidden_BLC)).unflatten(-1, (heads, 3 * width))
        if mask_BL is not None:  # padding adds nothing to a state
            qkv_BLHX = qkv_BLHX * mask_BL.as_subclass(Tensor)[..., None, None].to(qkv_BLHX.dtype)

        def kernel(tensors: Mapping[str, Tensor], groups: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Tensor:
            qkv_NMhX = tensors["qkv"]
            decays = {name: own[name].transpose(0, place) for name, place in PER_HEAD.items()}
            bare = SimpleNamespace(
                **decays,
                layer_idx=layer.layer_idx,
                head_dim=width,
                num_attention_heads=qkv_NMhX.shape[2],
                block_size=layer.block_size,
                qkv_proj=_same,
                act_fn=_same,
                norm=_same,
                out_proj=_same,
                output_gate=lambda x: x.new_tensor(torch.inf),  # a gate that is open
            )
            out: Tensor = self.original(bare, qkv_NMhX.flatten(2), (), None)[0]
            return out.unflatten(-1, (-1, width))

        parameters = {name: getattr(layer, name).transpose(0, place) for name, place in PER_HEAD.items()}
        out_BLC = scan_over_heads(kernel, context.layout, {"qkv": qkv_BLHX}, {}, parameters, width).flatten(2)
        gated: Tensor = torch.sigmoid(layer.output_gate(hidden_BLC)) * layer.norm(out_BLC)
        out: Tensor = layer.out_proj(gated)
        return out


def _same(x: Tensor) -> Tensor:
    return x
