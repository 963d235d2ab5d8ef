"""A decoder layer in chunks of tokens, its attention in groups of heads: all that exists for all tokens is attention's.

Outside attention a layer looks at one token at a time. So the layer's own code runs chunk by chunk twice: once until it
attends, which gives queries, keys and values, and once with attention's output given. Only these, of one group of heads
at a time, exist for all tokens, beside the layer's input and output. The layer keeps its input alone: it is its own
activation checkpoint.

    forward(x):   for group: q, k, v = before(x[chunk]) of every chunk
                             o[group], lse[group] = attention(q, k, v)
                  for chunk: y[chunk] = after(x[chunk], o[chunk])
    backward(dy): o, lse as in the forward
                  for chunk: dx[chunk], do[chunk], dw += gradients of after(x[chunk], o[chunk]), given dy[chunk]
                  for group: dq, dk, dv = backward of attention(q, k, v), given do[group]
                  for chunk: dx[chunk] += ..., dw += gradients of before(x[chunk]), given dq, dk, dv of the chunk

Weights are inputs of the one autograd function around it, as in `tiled_mlp.py`: DDP, FSDP2 and accumulation see one
gradient of each, summed over chunks in fp32 (or fp64). The gradient of the input takes the memory of that of the output
where nobody else has it.

A layer is tried out first (`layer_trial.py`). One that does not pass computes as before, and the log says so once.

Shape suffixes: B rows, L local tokens of a row, l tokens of a chunk, X width of a hidden state, H query heads, G kv
heads, h, g those of a group, D key width, E value width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from ..attention.call import Inputs
from ..batch.sharded_tensors import context_of
from ..compat import layer_forward, reference_counts
from ..distributed.comm import all_gather
from ..errors import UspModelError
from ..utils.autograd import forbid_double_backward, unshared_references
from ..utils.dtypes import autocast_dtype
from .layer_attention import LayerAttention, Sizes, joined
from .layer_call import LayerCall, Stock
from .layer_trial import try_layer, unsuited
from .tiled_mlp import add_gradient, autocast_of, stock_forward

logger = logging.getLogger(__name__)


class TiledLayer:
    """`forward` of one layer, in chunks.

    Attributes:
        offloader: what keeps inputs in host memory; None: they stay on the device.
    """

    def __init__(self, stock: Stock, sizes: Sizes, told: set[str]) -> None:
        self.stock, self.sizes, self.told = stock, sizes, told
        self.offloader: Any = None
        self.verdicts: dict[tuple[Any, ...], str | None] = {}

    def bind(self, layer: nn.Module) -> None:
        """Replace `layer.forward` by a method."""

        @wraps(type(layer).forward)
        def forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self(layer, *args, **kwargs)

        forward.tiled_layer = self  # type: ignore[attr-defined]
        layer.forward = MethodType(forward, layer)

    @torch.compiler.disable
    def __call__(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The layer's output. A graph of torch.compile ends here."""
        context = context_of(*args[1:], *kwargs.values())
        hidden = args[0] if args else None
        if context is None or context.whole_layers or not isinstance(hidden, Tensor):
            return type(layer).forward(layer, *args, **kwargs)
        if hidden.ndim == 3 and hidden.shape[1] <= self.sizes.chunk:
            return type(layer).forward(layer, *args, **kwargs)
        call = LayerCall(layer, self.stock, args[1:], kwargs, context, hidden)
        found = self._found(call, hidden)
        if found is not None:
            _tell(layer, found, self.told)
            return type(layer).forward(layer, *args, **kwargs)
        weights = [p for p in layer.parameters() if p.requires_grad]
        hooks: Any = nullcontext()
        if self.offloader is not None and torch.is_grad_enabled():
            hooks = saved_tensors_hooks(self.offloader.offload_apart, self.offloader.on_host)
        with hooks:
            output = _InChunks.apply(hidden, call, self.sizes, *weights)
        if autocast_dtype(hidden) is not None:
            torch.clear_autocast_cache()  # the casts of weights made here have no gradients
        return (output,) if call.returns_tuple else output

    def _found(self, call: LayerCall, hidden: Tensor) -> str | None:
        """Why this call is not computed in chunks, in words; the same on all ranks of the mesh."""
        if call.context.wants_router_logits:
            return "is asked for router logits"
        if hidden.ndim != 3:
            return f"takes hidden states of {hidden.ndim} dims"
        found = unsuited(call, hidden)
        if found is not None:
            return found
        signature = call.signature()
        if signature not in self.verdicts:
            self.verdicts[signature] = verdict(call, hidden)
        return self.verdicts[signature]


def verdict(call: LayerCall, hidden: Tensor) -> str | None:
    """The finding of a trial on any rank of the mesh: ranks that cut otherwise would send other messages."""
    found, group = try_layer(call, hidden), call.context.layout.mesh.group
    if group is None:
        return found
    flags = all_gather(torch.tensor([found is not None], dtype=torch.int64, device=hidden.device), group)
    return "does not pass its trial on another rank" if found is None and bool(flags.any()) else found


def tile_layers(model: PreTrainedModel, chunk: int, groups: int) -> list[nn.Module]:
    """Make the layers of a model compute in chunks of so many tokens; returns them. Again changes nothing.

    Raises:
        UspModelError: a model without layers that Transformers can checkpoint, or with fewer heads than groups.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer  # which loads every auto class

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UspModelError(
            f"layer_chunk_size with {type(model).__name__}, which has no layer that Transformers can checkpoint",
            rule="a layer in chunks is a GradientCheckpointingLayer of Transformers",
            remedy="leave out layer_chunk_size",
        )
    sizes, tiled, told = Sizes(chunk, groups, unshared_references()), list[nn.Module](), set[str]()
    for layer in layers:
        if tiled_layer(layer) is None:
            if stock_forward(layer) is not type(layer).forward:
                _tell(layer, "has a forward that somebody has replaced", told)
                continue
            TiledLayer(layer_forward(layer), sizes, told).bind(layer)
        tiled.append(layer)
    return tiled


def tiled_layer(module: nn.Module) -> TiledLayer | None:
    """The object that computes a layer in chunks; None for other modules."""
    return getattr(module.__dict__.get("forward"), "tiled_layer", None)


def untile_layers(model: nn.Module) -> None:
    """Layers are as they were before."""
    for module in model.modules():
        if tiled_layer(module) is not None:
            del module.forward


def _tell(layer: nn.Module, found: str, told: set[str]) -> None:
    """Once a model for each kind of layer."""
    message = f"{type(layer).__name__} computes all tokens at once, layer_chunk_size or not: it {found}"
    if message not in told:
        told.add(message)
        logger.info("usp: %s", message)


class _InChunks(torch.autograd.Function):
    """x_BLX -> y_BLX, the layer's output, by its own code. Forward without a graph, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, x_BLX: Tensor, call: LayerCall, sizes: Sizes, *weights: Tensor) -> Tensor:
        attention = LayerAttention(call, x_BLX, x_BLX.device, sizes, autocast_of(x_BLX))
        outs, _ = attention.forward()
        y_BLX = None
        for tokens in attention.chunks:
            part = attention.after(x_BLX[:, tokens], joined(outs, tokens), tokens)
            if y_BLX is None:
                y_BLX = part.new_empty(call.batch, call.length, *part.shape[2:])
            y_BLX[:, tokens] = part
            del part
        assert y_BLX is not None
        ctx.save_for_backward(x_BLX)
        ctx.call, ctx.sizes, ctx.weights, ctx.autocast = call, sizes, weights, attention.autocast
        ctx.training = call.layer.training
        return y_BLX

    @staticmethod
    @forbid_double_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        unshared = reference_counts(grads[0]) in ctx.sizes.unshared
        if ctx.call.layer.training != ctx.training:
            raise _changed_mode(ctx.call.layer)
        (x_BLX,) = ctx.saved_tensors
        dy_BLX = grads[0] if unshared and grads[0].is_contiguous() else grads[0].contiguous().clone()
        attention = LayerAttention(ctx.call, x_BLX, dy_BLX.device, ctx.sizes, ctx.autocast)
        del x_BLX
        return _Backward(attention, ctx.weights, ctx.needs_input_grad[0]).run(dy_BLX)


class _Backward:
    """The backward of one layer; gradients of its weights are summed over chunks."""

    def __init__(self, attention: LayerAttention, weights: Sequence[Tensor], wants_dx: bool) -> None:
        self.attention, self.weights, self.wants_dx = attention, weights, wants_dx
        self.totals: list[Tensor | None] = [None] * len(weights)

    def run(self, dy_BLX: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of all inputs of `_InChunks`. dx_BLX takes the place of dy_BLX."""
        outs, lses = self.attention.forward()
        douts = [torch.empty_like(out) for out in outs]
        for tokens in self.attention.chunks:
            self._after(dy_BLX, outs, douts, tokens)
        found = self.attention.backward(outs, lses, douts)
        for tokens in self.attention.chunks:
            self._before(dy_BLX, found, tokens)
        of_weights = [None if t is None else t.to(w.dtype) for t, w in zip(self.totals, self.weights, strict=True)]
        return dy_BLX if self.wants_dx else None, None, None, *of_weights

    def _after(self, dy_BLX: Tensor, outs: list[Tensor], douts: list[Tensor], tokens: slice) -> None:
        """Through what comes after attention, one chunk."""
        with torch.enable_grad():
            x_BlX = self.attention.chunk_of_x(tokens).detach().requires_grad_(self.wants_dx)
            out_BlHE = joined(outs, tokens).requires_grad_()
            y_BlX = self.attention.after(x_BlX, out_BlHE, tokens)
        dx, dout = self._gradients([y_BlX], [dy_BLX[:, tokens]], x_BlX, out_BlHE)
        del y_BlX
        _put(dy_BLX[:, tokens], dx)
        parts = [None] * len(outs) if dout is None else dout.split([out.shape[2] for out in outs], dim=2)
        for to, part in zip(douts, parts, strict=True):
            _put(to[:, tokens], part)

    def _before(self, dx_BLX: Tensor, found: list[Inputs], tokens: slice) -> None:
        """Through what comes before attention, one chunk."""
        with torch.enable_grad():
            x_BlX = self.attention.chunk_of_x(tokens).detach().requires_grad_(self.wants_dx)
            inputs = self.attention.before(x_BlX, tokens).inputs
        grads: list[Tensor | None] = [self.attention.joined([of[i] for of in found], i, tokens) for i in range(3)]  # type: ignore[misc]
        if tokens.start == 0 and inputs[3] is not None:  # sinks belong to no token
            grads.append(torch.cat([of[3] for of in found]).to(inputs[3].dtype))  # type: ignore[misc]
        pairs = [(x, grad) for x, grad in zip(inputs, grads, strict=False) if x is not None and x.requires_grad]
        del inputs, grads
        if pairs:
            dx, _ = self._gradients([x for x, _ in pairs], [grad for _, grad in pairs], x_BlX, None)
            if dx is not None:
                dx_BLX[:, tokens] += dx

    def _gradients(
        self, outputs: list[Tensor], grads: list[Any], x_BlX: Tensor, out_BlHE: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Those of a chunk's input and of attention's output; those of the weights are added to their sums."""
        others = [x for x in (x_BlX, out_BlHE) if x is not None and x.requires_grad]
        found = list(torch.autograd.grad(outputs, [*others, *self.weights], grads, allow_unused=True))
        outputs.clear()
        dx = found.pop(0) if x_BlX.requires_grad else None
        dout = found.pop(0) if out_BlHE is not None else None
        while found:  # the last first, each freed once it is added
            i = len(found) - 1
            self.totals[i] = add_gradient(self.totals[i], found.pop())
        return dx, dout


def _put(to: Tensor, part: Tensor | None) -> None:
    if part is None:
        to.zero_()
    else:
        to.copy_(part)


def _changed_mode(layer: nn.Module) -> UspModelError:
    return UspModelError(
        f"{type(layer).__name__}.training is {layer.training} in the backward, and was another in the forward",
        rule="a layer in chunks is computed again in its backward, as in its forward",
        remedy="call model.train() or model.eval() before the forward, or after the backward",
    )
