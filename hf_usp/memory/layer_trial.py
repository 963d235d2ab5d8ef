"""Whether a layer can be computed in chunks: tried on a few tokens, not believed.

The layer runs on a few tokens together and in two parts, with a stand-in for attention that looks at one token at a
time. It has to attend once, return hidden states alone, give the same both ways, draw no random numbers, write into no
buffer, and read no weights but its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..batch.sharded_tensors import ShardedMask
from ..compat import has_gradient_hooks, is_zero3_parameter, write_count
from ..utils.dtypes import autocast_dtype
from .layer_call import PASSED_ON, LayerCall
from .tiled_mlp import TRIED, same_values


def unsuited(call: LayerCall, hidden: Any) -> str | None:
    """The reason, without a trial, that a layer cannot be computed in chunks, in words."""
    layer = call.layer
    if any(is_zero3_parameter(p) for p in layer.parameters()) or _gathers_inside(layer):
        return "has weights that are gathered inside it (ZeRO-3, or FSDP2 around single modules)"
    if any(has_gradient_hooks(p) for p in layer.parameters() if p.requires_grad):
        return "has weights with gradient hooks, which would run for every chunk"
    for name, value in call.arguments():
        # A mask that says more than which tokens see each other: the layer looks at others outside its attention, too.
        of_all_tokens = isinstance(value, ShardedMask) and type(value) is not ShardedMask
        if of_all_tokens or not isinstance(value, PASSED_ON):
            return f"takes `{name}`, a {type(value).__name__}"
        if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
            return f"takes `{name}`, which wants a gradient as hidden states do"
    return None


def _gathers_inside(layer: nn.Module) -> bool:
    return any(hasattr(module, "set_reshard_after_forward") for module in layer.modules() if module is not layer)


def try_layer(call: LayerCall, hidden_BLX: Tensor) -> str | None:
    """The reason that a layer cannot be computed in chunks, in words. Random state and gradients stay as they were."""
    few = min(TRIED, call.length)
    cut = -(-few // 3)
    try:
        with _as_before(call.layer, hidden_BLX.device) as changes:
            together = _Trial(call, hidden_BLX, slice(0, few))
            parts = [_Trial(call, hidden_BLX, part) for part in (slice(0, cut), slice(cut, few))]
    except Exception as problem:
        return f"fails on some of its tokens alone ({type(problem).__name__}: {str(problem)[:100]})"
    problems = [*changes, *(trial.found for trial in (together, *parts) if trial.found)]
    if problems:
        return problems[0]
    for whole, *cut_up in zip(together.values, *(part.values for part in parts), strict=True):
        if not same_values(whole, torch.cat(cut_up, dim=1)):
            return "gives other values for some tokens when the others are left out"
    return None


class _Trial:
    """One run on some tokens.

    found: what cannot be, in words. values: what it gave attention, and its output, [B, l, ...] each.
    """

    def __init__(self, call: LayerCall, hidden_BLX: Tensor, tokens: slice) -> None:
        self.found: str | None = None
        self.values: list[Tensor] = []
        asked: list[Any] = []

        def stand_in(inputs: Any, mask_spec: Any, softmax: Any) -> Tensor:
            asked.append(inputs)
            q_BlHD, k_BlHD = inputs[0], _of_each_query_head(inputs[1], inputs[0])
            score_BlH1 = (q_BlHD * k_BlHD).sum(-1, keepdim=True) * softmax.scale
            return (1 + score_BlH1.tanh()) * _of_each_query_head(inputs[2], inputs[0])

        part_BlX = hidden_BLX[:, tokens].detach().requires_grad_(torch.is_grad_enabled())
        output = call.run(part_BlX, tokens, stand_in)
        if isinstance(output, tuple) and len(output) == 1:
            output = output[0]
        if len(asked) != 1:
            self.found = f"attends {len(asked)} times"
        elif not isinstance(output, Tensor):
            self.found = "returns more than hidden states"
        else:
            self.values = [*asked[0][:3], output]
            own = {id(x) for x in (part_BlX, *call.layer.parameters())}
            if any(id(leaf) not in own for leaf in _leaves(self.values)):
                self.found = "reads weights of other modules"


def _of_each_query_head(x_BlGD: Tensor, q_BlHD: Tensor) -> Tensor:
    return x_BlGD.repeat_interleave(q_BlHD.shape[2] // x_BlGD.shape[2], dim=2)


def _leaves(outputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors for which the backward of some outputs would sum gradients."""
    waiting, seen = [x.grad_fn for x in outputs if x.grad_fn is not None], set[Any]()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf
        waiting += [inner for inner, _ in node.next_functions if inner is not None]


@contextmanager
def _as_before(layer: nn.Module, device: torch.device) -> Iterator[list[str]]:
    """A trial inside changes no random state, and casts no weights for those who come after it.

    Autocast keeps the casts of weights, those of a forward without gradients too. The list is filled afterwards.
    """
    found: list[str] = []
    devices = [] if device.type == "cpu" else [device]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"))
        if autocast_dtype(torch.empty(0, device=device)) is not None:
            kind = device.type
            dtype = torch.get_autocast_dtype(kind)
            stack.enter_context(torch.autocast(kind, dtype, cache_enabled=False))
        buffers = [(m, name, b, write_count(b), b.clone()) for m in layer.modules() for name, b in _buffers(m)]
        draws = _draws(device)
        yield found
        if not all(map(torch.equal, _draws(device)[1:], draws[1:])) or _draws(device)[0] != draws[0]:
            found.append("draws random numbers")
        for module, name, buffer, writes, value in buffers:
            if dict(_buffers(module)).get(name) is not buffer or write_count(buffer) != writes:
                found.append("writes into its buffers")
                module._buffers[name] = buffer.copy_(value)


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, buffer) for name, buffer in module._buffers.items() if buffer is not None]


def _draws(device: torch.device) -> list[Any]:
    """State that changes where random numbers are drawn."""
    of_device = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state(device)]
    return [random.getstate(), torch.get_rng_state(), *of_device]
