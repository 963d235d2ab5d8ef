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
from dataclasses import replace
from functools import wraps
from types import MethodType
from typing import Any, NamedTuple

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
from .layer_attention import LayerAttention, Sizes
from .layer_call import LayerCall, Stock
from .layer_trial import try_layer, unsuited
from .offloader import ActivationOffloader
from .tiled_mlp import add_gradient, autocast_of, stock_forward

logger = logging.getLogger(__name__)


class TiledLayer:
    """`forward` of one layer, in chunks.

    Attributes:
        offloader: what keeps inputs, and what is kept beside them, in host memory; None: they stay on the device.
    """

    def __init__(self, stock: Stock, sizes: Sizes, told: set[str], later: int) -> None:
        self.stock, self.sizes, self.told, self.later = stock, sizes, told, later
        self.offloader: ActivationOffloader | None = None
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
        way = None if context is None else context.way
        whole = context is None or context.whole_layers or (way is not None and way.layer_chunk_size is None)
        if whole or not isinstance(hidden, Tensor):
            return type(layer).forward(layer, *args, **kwargs)
        if hidden.ndim == 3 and hidden.shape[1] <= self.sizes.chunk:
            return type(layer).forward(layer, *args, **kwargs)
        assert context is not None
        call = LayerCall(layer, self.stock, args[1:], kwargs, context, hidden)
        found = self._found(call, hidden)
        if found is not None:
            _tell(layer, found, self.told)
            return type(layer).forward(layer, *args, **kwargs)
        weights = [p for p in layer.parameters() if p.requires_grad]
        hooks: Any = nullcontext()
        sizes = self.sizes
        offloader = self.offloader
        if way is not None:
            sizes = replace(sizes, groups=way.head_groups, kept=way.keep_attention)
            offloader = offloader if way.offload else None
        keeping = _Keeping(None, False)
        if torch.is_grad_enabled():
            keeping = _Keeping(offloader, self.later < sizes.kept)
            if offloader is not None:
                hooks = saved_tensors_hooks(offloader.take_started, offloader.on_host)
        with hooks:
            output = _InChunks.apply(hidden, call, sizes, keeping, *weights)
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


def tile_layers(model: PreTrainedModel, chunk: int, groups: int, keep_attention: bool | int = False) -> list[nn.Module]:
    """Make the layers of a model compute in chunks of so many tokens; returns them. Again changes nothing.

    Attention is kept of the last layers: what they keep goes first in the backward, and is gone when a layer before
    them computes attention's output again.

    Raises:
        UspModelError: a model without layers that Transformers can checkpoint, or with fewer than are to be kept.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer  # which loads every auto class

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UspModelError(
            f"layer_chunk_size with {type(model).__name__}, which has no layer that Transformers can checkpoint",
            rule="a layer in chunks is a GradientCheckpointingLayer of Transformers",
            remedy="leave out layer_chunk_size",
        )
    if keep_attention > len(layers):
        raise UspModelError(
            f"keep_attention={keep_attention} with {type(model).__name__}, which has {len(layers)} such layers",
            rule="attention's output is kept of so many layers, at most all of them",
            remedy="pass keep_attention=True for all layers, or at most their number",
        )
    kept = len(layers) if keep_attention is True else int(keep_attention)
    sizes, tiled, told = Sizes(chunk, groups, unshared_references(), kept), list[nn.Module](), set[str]()
    for i, layer in enumerate(layers):
        if tiled_layer(layer) is None:
            if stock_forward(layer) is not type(layer).forward:
                _tell(layer, "has a forward that somebody has replaced", told)
                continue
            TiledLayer(layer_forward(layer), sizes, told, len(layers) - 1 - i).bind(layer)
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


class _Keeping(NamedTuple):
    """Where a layer keeps what its backward needs, and whether attention's output and log-sum-exp are part of it."""

    offloader: ActivationOffloader | None
    attention: bool


class _InChunks(torch.autograd.Function):
    """x_BLX -> y_BLX, the layer's output, by its own code. Forward without a graph, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, x_BLX: Tensor, call: LayerCall, sizes: Sizes, keeping: _Keeping, *weights: Tensor) -> Tensor:
        attention = LayerAttention(call, x_BLX, x_BLX.device, sizes, autocast_of(x_BLX), None)
        offloader = keeping.offloader
        if offloader is not None:
            offloader.make_room(x_BLX, call.context, attention.bytes_kept() * sizes.kept)
            offloader.start(x_BLX)
        if offloader is not None and keeping.attention:
            outs, lses = attention.forward(offloader.start)
        else:
            outs, lses = attention.forward()
        y_BLX = None
        for tokens, (x_BlX, *out) in attention.parts(*outs):
            part = attention.after(x_BlX, torch.cat(out, dim=2), tokens)
            if y_BLX is None:
                y_BLX = part.new_empty(call.batch, call.length, *part.shape[2:])
            y_BLX[:, tokens] = part
            del part
        assert y_BLX is not None
        ctx.save_for_backward(x_BLX, *(outs + lses if keeping.attention else ()))
        ctx.call, ctx.sizes, ctx.weights, ctx.autocast = call, sizes, weights, attention.autocast
        ctx.offloader = offloader
        ctx.training = call.layer.training
        return y_BLX

    @staticmethod
    @forbid_double_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        unshared = reference_counts(grads[0]) in ctx.sizes.unshared
        if ctx.call.layer.training != ctx.training:
            raise _changed_mode(ctx.call.layer)
        x_BLX, *kept = ctx.saved_tensors
        dy_BLX = grads[0] if unshared and grads[0].is_contiguous() else grads[0].contiguous().clone()
        attention = LayerAttention(ctx.call, x_BLX, dy_BLX.device, ctx.sizes, ctx.autocast, ctx.offloader)
        del x_BLX
        return _Backward(attention, ctx.weights, ctx.needs_input_grad[0]).run(dy_BLX, kept)


class _Backward:
    """The backward of one layer; gradients of its weights are summed over chunks."""

    def __init__(self, attention: LayerAttention, weights: Sequence[Tensor], wants_dx: bool) -> None:
        self.attention, self.weights, self.wants_dx = attention, weights, wants_dx
        self.totals: list[Tensor | None] = [None] * len(weights)

    def run(self, dy_BLX: Tensor, kept: list[Tensor]) -> tuple[Tensor | None, ...]:
        """The gradients of all inputs of `_InChunks`. dx_BLX takes the place of dy_BLX."""
        half = len(kept) // 2
        outs, lses = (kept[:half], kept[half:]) if kept else self.attention.forward()
        kept.clear()
        douts = self._after(dy_BLX, outs)
        found = self.attention.backward(outs, lses, douts)
        self._before(dy_BLX, found)
        of_weights = [None if t is None else t.to(w.dtype) for t, w in zip(self.totals, self.weights, strict=True)]
        return dy_BLX if self.wants_dx else None, None, None, None, *of_weights

    def _after(self, dy_BLX: Tensor, outs: list[Tensor]) -> list[Tensor]:
        """Through what comes after attention; dout_BLhE of each group."""
        douts = [torch.empty_like(out, device=dy_BLX.device) for out in outs]
        for tokens, (x_BlX, *out) in self.attention.parts(*outs):
            with torch.enable_grad():
                x_BlX = x_BlX.detach().requires_grad_(self.wants_dx)
                out_BlHE = torch.cat(out, dim=2).requires_grad_()
                y_BlX = self.attention.after(x_BlX, out_BlHE, tokens)
            outputs = [y_BlX]
            del y_BlX
            dx, dout = self._gradients(outputs, [dy_BLX[:, tokens]], x_BlX, out_BlHE)
            _put(dy_BLX[:, tokens], dx)
            parts = [None] * len(outs) if dout is None else dout.split([x.shape[2] for x in outs], dim=2)
            for to, part in zip(douts, parts, strict=True):
                _put(to[:, tokens], part)
        return douts

    def _before(self, dx_BLX: Tensor, found: list[Inputs]) -> None:
        """Through what comes before attention."""
        for tokens, (x_BlX,) in self.attention.parts():
            with torch.enable_grad():
                x_BlX = x_BlX.detach().requires_grad_(self.wants_dx)
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
