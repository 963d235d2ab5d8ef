"""The glue for recurrent layers: their own forward, with the kernels that it calls working on a sharded sequence.

Transformers writes such layers around a few functions that carry the names of well-known kernels (causal-conv1d,
flash-linear-attention, mamba-ssm) and look across tokens; all else in a layer is token by token. A prepared model's
layers run the same code as before, in which these names mean their sharded counterparts (`scan`). Only the layers of
the prepared model change, and only until they are released; outside a sharded forward they call the original functions.

Shape suffixes: B rows, L tokens, H heads, G groups of heads, C channels, E width of a value, N state. Arguments carry
the names of the kernels' own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..batch.context import ForwardContext
from ..batch.sharded_tensors import context_of
from ..errors import UspModelError
from ..recurrent.device_schedule import state_schedule
from ..recurrent.final_states import gather_states
from ..recurrent.scan import causal_conv, scan_over_heads
from ..recurrent.schedule import ScanSizes, states_pay
from ..recurrent.state_passing import scan_by_states
from .attention_interface import recurrent_types
from .pickling import NotSaved
from .unsharded import refuse_unsharded

Function = Callable[..., Any]


class RecurrentLayers(NotSaved):
    """The recurrent layers of one prepared model, and the context of the forward that they are part of."""

    def __init__(self, model: nn.Module) -> None:
        self.context: ForwardContext | None = None
        own = (m for m in model.modules() if getattr(m.forward, "__func__", None) is type(m).forward)
        self.layers = [m for m in own if _kernels_of(type(m).forward)]
        for layer in self.layers:
            layer.forward = MethodType(self._rebind(type(layer).forward), layer)
        # The mask that a layer gets carries the context, also when the layer is recomputed in the backward.
        self.handles = [layer.register_forward_pre_hook(self._enter, with_kwargs=True) for layer in self.layers]

    def release(self) -> None:
        for handle in self.handles:
            handle.remove()
        for layer in self.layers:
            del layer.forward
        self.layers = []

    @torch.compiler.disable
    def _enter(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.context = context_of(*args, *kwargs.values())
        if self.context is None:
            refuse_unsharded(layer)

    def _rebind(self, function: Function) -> Function:
        """The same code with sharded kernels under their names, in what its decorators wrap too."""
        if not isinstance(function, FunctionType):
            return function
        own = {name: partial(self._call, SHARDED[name], function.__globals__[name]) for name in _names(function)}
        cells = tuple(self._rebind_cell(cell) for cell in function.__closure__ or ())
        copy = FunctionType(
            function.__code__, {**function.__globals__, **own}, function.__name__, function.__defaults__, cells
        )
        copy.__kwdefaults__ = function.__kwdefaults__
        copy.__dict__.update({k: v for k, v in function.__dict__.items() if k != "__wrapped__"})
        return copy

    def _rebind_cell(self, cell: CellType) -> CellType:
        return CellType(self._rebind(cell.cell_contents)) if _kernels_of(cell.cell_contents) else cell

    @torch.compiler.disable
    def _call(self, sharded: Function | None, original: Function, *args: Any, **kwargs: Any) -> Any:
        if self.context is None:
            return original(*args, **kwargs)
        self.context.recurrent_calls += 1
        if sharded is None:
            return None  # a fused kernel; the layer then takes its separate steps, as it does without that kernel
        kwargs.pop("usp", None)
        return sharded(original, self.context, *args, **kwargs)


def shard_recurrent_layers(model: nn.Module) -> RecurrentLayers:
    """Make a model's recurrent layers work on `hf_usp.shard`'s batches, for a hand-written loop. Call it once.

    `Accelerator.prepare` does the same for a prepared model. The result's `release()` takes it back. Raises
    `UspModelError` where a model has recurrent layers that it cannot find (their recurrence is in their own code).
    """
    layers = RecurrentLayers(model)
    named = recurrent_types(model)
    if len(layers.layers) < len(named):
        layers.release()
        raise UspModelError(
            f"{type(model).__name__} has {len(named)} layers of type {', '.join(sorted(set(named)))}; "
            f"{len(layers.layers)} of them use kernels that can be sharded",
            rule="a recurrence is sharded where a layer calls one of " + ", ".join(SHARDED),
            remedy="train this model in one process",
        )

    def mark_prepared(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        context = context_of(*kwargs.values())
        if context is not None:
            context.manual_loop = False  # somebody has prepared what attention cannot see to

    layers.handles.append(model.register_forward_pre_hook(mark_prepared, with_kwargs=True))
    return layers


def has_recurrent_layers(model: nn.Module) -> bool:
    """Whether some layer of the model calls a kernel that has a sharded counterpart."""
    return bool(recurrent_kernels(model))


def recurrent_kernels(model: nn.Module) -> list[set[str]]:
    """The kernels with a sharded counterpart that each recurrent layer of a model calls."""
    return [names for module in model.modules() if (names := _kernels_of(type(module).forward))]


def _names(function: FunctionType) -> set[str]:
    """Names of kernels that this function's own code calls."""
    return {name for name in function.__code__.co_names if name in SHARDED and name in function.__globals__}


def _kernels_of(function: Any) -> set[str]:
    """Names of kernels that a function calls, also inside its decorators."""
    if not isinstance(function, FunctionType):
        return set()
    inside = inspect.unwrap(function)
    return _names(function) | (_names(inside) if isinstance(inside, FunctionType) else set())


def _conv(
    original: Function,
    context: ForwardContext,
    x_BCL: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Tensor:
    """causal_conv1d_fn (causal-conv1d): a depthwise convolution, weight [C, K]."""
    _refuse_packing(kwargs, ("seq_idx", "initial_states", "return_final_states"))
    return causal_conv(
        lambda x: original(x, weight, bias, activation=activation), x_BCL, weight.shape[-1] - 1, context.layout
    )


def _delta_rule(
    original: Function,
    context: ForwardContext,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """chunk_gated_delta_rule, chunk_kda (flash-linear-attention): query, key [B, L, G, N], value [B, L, H, E],
    beta [B, L, H], g [B, L, H] or [B, L, H, N]."""
    final = _final_state(context, kwargs, "output_final_state")
    _refuse_packing(kwargs, ("initial_state", "output_final_state", "cu_seqlens"))

    heads, groups = {"value": value, "g": g, "beta": beta}, {"query": query, "key": key}
    sizes = ScanSizes(value.shape[2], key.shape[2], key.shape[3], value.shape[3], value.element_size())
    layout = context.layout
    tokens = layout.batch * layout.local_length
    pays = context.options.pass_states
    if pays is None:
        pays = states_pay(sizes, tokens, layout.mesh.size, state_schedule(layout).busiest)
    if pays and not final:

        def with_states(x: Mapping[str, Tensor], first: Tensor | None, final: bool) -> tuple[Tensor, Tensor | None]:
            return original(**x, initial_state=first, output_final_state=final, **kwargs)

        return scan_by_states(with_states, layout, groups | heads), None

    states: list[Tensor] = []

    def kernel(heads: Mapping[str, Tensor], groups: Mapping[str, Tensor], _: Mapping[str, Tensor]) -> Tensor:
        out, state = original(**groups, **heads, **({"output_final_state": True} if final else {}), **kwargs)
        states.append(state)
        return out

    out = scan_over_heads(kernel, layout, heads, groups, {}, value.shape[-1])
    if not final:
        return out, None
    state_size = (key.shape[3], value.shape[3])
    return out, gather_states(states, value.shape[2], key.shape[2], state_size, value, layout)


def _ssd(
    original: Function,
    context: ForwardContext,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *args: Any,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    z: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """mamba_chunk_scan_combined (mamba-ssm, Mamba-2): x [B, L, H, E], dt [B, L, H], B, C [B, L, G, N]; A, D,
    dt_bias [H]."""
    final = _final_state(context, kwargs, "return_final_states")
    _refuse_packing(kwargs, ("initial_states", "return_final_states", "seq_idx"))
    states: list[Tensor] = []
    optional = {name: p for name, p in (("D", D), ("dt_bias", dt_bias)) if p is not None}

    def kernel(heads: Mapping[str, Tensor], groups: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Tensor:
        extra = {name: own[name] for name in optional} | ({"z": heads["z"]} if z is not None else {})
        inputs = heads["x"], heads["dt"], own["A"], groups["B"], groups["C"]
        out = original(*inputs, *args, return_final_states=final, **extra, **kwargs)
        if final:
            states.append(out[1])
        return out[0] if final else out

    heads = {"x": x, "dt": dt} | ({} if z is None else {"z": z})
    out = scan_over_heads(kernel, context.layout, heads, {"B": B, "C": C}, {"A": A} | optional, x.shape[-1])
    if not final:
        return out
    return out, gather_states(states, x.shape[2], B.shape[2], (x.shape[3], B.shape[3]), x, context.layout)


def _selective_scan(
    original: Function,
    context: ForwardContext,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """selective_scan_fn (mamba-ssm, Mamba): x, dt, z [B, C, L], A [C, N], B, C [B, N, L], D, delta_bias [C]; a channel
    is a head."""
    final = _final_state(context, kwargs, "return_last_state")
    _refuse_packing(kwargs, ("return_last_state",))
    states: list[Tensor] = []
    optional = {name: p for name, p in (("D", D), ("delta_bias", delta_bias)) if p is not None}

    def kernel(heads: Mapping[str, Tensor], groups: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Tensor:
        # The kernel's B and C serve all channels, so a rank's group stands at index 0 whatever its channels are.
        b, c = (groups[name][:, :, 0].transpose(1, 2) for name in ("B", "C"))
        extra: dict[str, Any] = {name: own[name] for name in optional} | (
            {"z": heads["z"].transpose(1, 2)} if z is not None else {}
        )
        extra |= {"return_last_state": True} if final else {}
        out = original(heads["x"].transpose(1, 2), heads["dt"].transpose(1, 2), own["A"], b, c, **extra, **kwargs)
        if final:
            states.append(out[1])
        return (out[0] if final else out).transpose(1, 2)

    heads = {name: t.transpose(1, 2) for name, t in (("x", x), ("dt", dt), ("z", z)) if t is not None}
    groups = {name: t.transpose(1, 2).unsqueeze(2) for name, t in (("B", B), ("C", C))}
    out = scan_over_heads(kernel, context.layout, heads, groups, {"A": A} | optional, 1).squeeze(-1).transpose(1, 2)
    return (out, gather_states(states, x.shape[1], 1, (A.shape[1],), x, context.layout)) if final else out


def _final_state(context: ForwardContext, kwargs: dict[str, Any], name: str) -> bool:
    """Whether a layer asks for the state after the last token, which it keeps in the cache that a prefill fills."""
    return context.cache is not None and bool(kwargs.pop(name, False))


def _refuse_packing(kwargs: dict[str, Any], names: tuple[str, ...]) -> None:
    """Drop keywords about states and documents that say nothing; refuse those that do."""
    for name in names:
        value = kwargs.pop(name, None)
        if value is not None and value is not False:
            raise UspModelError(
                f"a recurrent layer passes `{name}` to its kernel in a sharded forward",
                rule="documents and states along the sequence are described by the layout",
                remedy="call the model without a cache; describe documents with cu_seq_lens_q or position_ids",
            )


# Functions of Transformers' modeling files, by name. None: a fused kernel that a layer may do without.
SHARDED: dict[str, Function | None] = {
    "causal_conv1d_fn": _conv,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "mamba2_chunk_scan": _ssd,
    "mamba_selective_scan": _selective_scan,
    "mamba2_split_conv1d_scan_combined": None,
    "mamba_inner_fn": None,
}
