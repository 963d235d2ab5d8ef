"""Modules that look a few tokens back, on a sharded sequence: n-gram embeddings, dilated and short convolutions.

Such a module keeps its last tokens in the cache of Transformers (`update_conv_state`). In a sharded forward it gets
them from the ranks that hold them: each run of consecutive tokens of a document follows the `reach` tokens before it.
The module's own code runs on each of these pieces. Where a document begins it runs as at the start of a row.

Shape suffixes: B rows, L tokens of a row on this rank, T = B * L, M tokens of a piece.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..batch.context import ForwardContext
from ..batch.sharded_tensors import context_of
from ..recurrent.device_schedule import HaloWork, halo_device_schedule
from ..recurrent.scan import exchange
from .pickling import NotSaved


def reach_of(module: Any) -> int:
    """How many earlier tokens a token's result depends on; 0 for modules of other kinds."""
    if hasattr(module, "short_conv_state_len") and hasattr(module, "ple_embedding"):
        # Qwen4: a dilated convolution over what n-gram embeddings have given.
        return int(module.short_conv_state_len + module.ple_embedding.context_len)
    if hasattr(module, "depthwise_kernel_size") and hasattr(module, "v_proj_delayed"):
        return max(int(module.conv_kernel_size), 1)  # Zaya: two convolutions, and values of the token before
    return 0


class LookBackLayers(NotSaved):
    """The modules of one prepared model that look a few tokens back."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: list[Any] = [module for module in model.modules() if reach_of(module)]
        for module in self.modules:
            module.forward = MethodType(OnPieces(type(module).forward, reach_of(module)), module)

    def release(self) -> None:
        for module in self.modules:
            del module.forward
        self.modules = []


def runs_on_pieces(module: nn.Module) -> bool:
    """Whether the modules inside this one see pieces of the sequence instead of this rank's tokens."""
    return isinstance(getattr(module.__dict__.get("forward"), "__func__", None), OnPieces)


class OnPieces(NotSaved):
    """The forward of a module that looks back `reach` tokens: its own code, in a sharded forward on pieces."""

    def __init__(self, original: Callable[..., Any], reach: int) -> None:
        self.original, self.reach, self.signature = original, reach, inspect.signature(original)
        self.__name__ = "forward"  # pickled, the bound method is the module's own

    @torch.compiler.disable
    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = dict(self.signature.bind(module, *args, **kwargs).arguments)
        context = context_of(*given.values())
        if context is None:
            return self.original(module, *args, **kwargs)
        context.recurrent_calls += 1
        given = {name: x for name, x in given.items() if x is not module}
        return self._on_pieces(module, given, context)

    def _on_pieces(self, module: nn.Module, given: dict[str, Any], context: ForwardContext) -> Any:
        shape = (context.layout.batch, context.layout.local_length)
        tokens = {n: _plain(x) for n, x in given.items() if isinstance(x, Tensor) and x.shape[:2] == shape}
        device = next(iter(tokens.values())).device
        plan = halo_device_schedule(context.layout, self.reach, device)
        extended = {name: _with_halo(x, plan, context) for name, x in tokens.items()}
        own = shape[0] * shape[1] + sum(plan.receive)
        there = (plan.extended < own).tolist()  # where a document begins, nothing is
        parts: list[tuple[Tensor, ...]] = []
        single = True
        for start, stop in _pieces(plan.results, self.reach):
            first = next(i for i in range(start, stop) if there[i])
            out = self.original(module, **given | {n: x[None, first:stop] for n, x in extended.items()})
            single = isinstance(out, Tensor)
            parts.append(tuple(x[0, start + self.reach - first :] for x in ((out,) if single else out)))
        results = tuple(torch.cat(of_pieces).unflatten(0, shape) for of_pieces in zip(*parts, strict=True))
        return results[0] if single else results


def _plain(x: Tensor) -> Tensor:
    return x.as_subclass(Tensor) if type(x) is not Tensor else x


def _with_halo(x_BLX: Tensor, plan: HaloWork, context: ForwardContext) -> Tensor:
    """Tokens of one kind, every run after those before it, in the order of `plan.extended`."""
    x_TX = x_BLX.flatten(0, 1)
    width = x_TX[0].numel()
    sizes = [[len(index) * width for index in plan.send]], [[n * width for n in plan.receive]]
    wire = x_TX.to(torch.uint8) if x_TX.dtype == torch.bool else x_TX
    (halo,) = exchange(context.layout.mesh.group, *sizes, torch.cat([wire[index].reshape(-1) for index in plan.send]))
    nothing = wire.new_zeros(1, *wire.shape[1:])
    return torch.cat([wire, halo.view(-1, *wire.shape[1:]), nothing])[plan.extended].to(x_TX.dtype)


def _pieces(results: Tensor, reach: int) -> list[tuple[int, int]]:
    """Where each run with the tokens before it begins and ends in the order of `HaloWork.extended`."""
    places = results.tolist()
    edges = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(places)) if b != a + 1), len(places)]
    return [(places[a] - reach, places[b - 1] + 1) for a, b in pairwise(edges)]
