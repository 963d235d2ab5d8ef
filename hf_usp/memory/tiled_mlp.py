"""The MLP of every layer in chunks of tokens: its intermediate activations never exist for all tokens.

An MLP looks at one token at a time, and between its matrices a token is several times as wide as outside: gate, up,
activation and product of a Llama are about 4 x 3.5 hidden states. Here the MLP runs chunk by chunk. Its input is all
that is kept, and the backward computes each chunk again before it goes back through it (as ALST's TiledMLP does).

The module itself runs, by its own code, on each chunk; its weights are inputs of the one autograd function around it,
so their gradients appear once and whole: DDP, FSDP2 and accumulation see an ordinary layer. They are summed over chunks
in fp32 (or fp64), so bf16 loses nothing by chunks.

Found by structure: a child of a decoder layer that takes one argument and holds at least two matrices. That it works
token by token is tried out, not believed. Norms compute in the same way (`tiled_norm.py`).

Shape suffixes: T tokens, D width.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..compat import has_gradient_hooks, is_zero3_parameter
from ..errors import UspModelError
from ..kernels import accumulation_dtype
from ..utils.autograd import forbid_double_backward
from ..utils.dtypes import autocast_dtype

Forward = Callable[[nn.Module, Tensor], Tensor]
Autocast = Callable[[], AbstractContextManager[Any]]
TRIED = 8  # tokens of the trial


class TiledForward(ABC):
    """`forward` of one module, in chunks of `chunk` tokens."""

    def __init__(self, stock: Forward, chunk: int) -> None:
        self.stock, self.chunk, self.tried = stock, chunk, False

    @abstractmethod
    def __call__(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """The module's output for hidden states of any leading shape."""

    def bind(self, module: nn.Module) -> None:
        """Replace `module.forward` by a method: a real function, of which torch.compile wants to know the file."""

        def forward(module: nn.Module, hidden: Tensor) -> Tensor:
            return self(module, hidden)

        forward.tiled = self  # type: ignore[attr-defined]
        module.forward = MethodType(forward, module)

    def in_chunks(self, module: nn.Module, hidden: Tensor, chunk: int) -> Tensor:
        """The module's output for hidden states of any leading shape, `chunk` of their rows at a time."""
        weights = [p for p in module.parameters() if p.requires_grad]
        out_TD = _InChunks.apply(hidden.reshape(1, -1, hidden.shape[-1]), module, self.stock, chunk, *weights)
        return out_TD.view(*hidden.shape[:-1], -1)

    def try_out(self, module: nn.Module, few_TD: Tensor) -> str | None:
        """Find what shows that the module is not token by token: a few tokens together, and in two parts."""
        self.tried = True
        cut = -(-few_TD.shape[1] // 3)
        with torch.no_grad():
            together = self.stock(module, few_TD)
            parts = [self.stock(module, x) for x in few_TD.tensor_split([cut], dim=1)]
        if not all(isinstance(x, Tensor) for x in (together, *parts)):
            return "returns more than hidden states"
        if not same_values(together, torch.cat(parts, dim=1)):
            return "gives other values for some tokens when the others are left out"
        return None


def same_values(mine: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal but for rounding."""
    tolerance = 8 * torch.finfo(mine.dtype).eps ** (0.5 if mine.dtype == torch.float64 else 0.75)
    return bool((mine - other).abs().max() <= tolerance * mine.abs().max())


class TiledMLP(TiledForward):
    """`forward` of one MLP. An MLP that is not token by token is refused."""

    @torch.compiler.disable
    def __call__(self, mlp: nn.Module, hidden: Tensor) -> Tensor:
        """The MLP's output for hidden states of any leading shape. A graph of torch.compile ends here."""
        if not self.tried:
            self.check(mlp, hidden.detach().flatten(0, -2)[None, :TRIED])
        if hidden.shape[:-1].numel() <= self.chunk:
            return self.stock(mlp, hidden)
        _check_gathered(mlp)
        return self.in_chunks(mlp, hidden, self.chunk)

    def check(self, mlp: nn.Module, few_TD: Tensor) -> None:
        """Raise `UspModelError` unless a few tokens give the same together and in two parts."""
        found = self.try_out(mlp, few_TD)
        if found is not None:
            raise _refuse(mlp, found, "leave out mlp_chunk_size; with dropout inside an MLP, set it to 0")


def tile_mlps(model: PreTrainedModel, chunk: int) -> list[nn.Module]:
    """Make the MLPs of a model's layers compute in chunks of so many tokens; returns them. Again changes nothing.

    Raises:
        UspModelError: a model without MLPs of their own in its layers, with experts or convolutions in them, with
            dropout, or whose MLPs are not token by token.
    """
    mlps = find_mlps(model)
    for mlp in mlps:
        if chunked(mlp):
            continue
        stock = stock_forward(mlp)
        if stock is None:
            raise _refuse(
                mlp, "has a forward that somebody has replaced", "leave out mlp_chunk_size, or what replaced it"
            )
        ours = TiledMLP(stock, chunk)
        if all(_is_whole(p) for p in mlp.parameters()):
            width = model.config.get_text_config().hidden_size
            first = next(mlp.parameters())
            few_TD = torch.linspace(-1, 1, TRIED * width, device=first.device, dtype=first.dtype).view(1, TRIED, width)
            ours.check(mlp, few_TD.sin())
        ours.bind(mlp)
    return mlps


def _is_whole(weight: nn.Parameter) -> bool:
    """Whether a weight can be computed with: here, and no part of one that FSDP2 has sharded."""
    return weight.is_floating_point() and weight.device.type != "meta" and not hasattr(weight, "placements")


def untile(model: nn.Module) -> None:
    """MLPs and norms are as they were before."""
    for module in model.modules():
        tiled = tiled_forward(module)
        if tiled is not None:
            stock = tiled.stock
            del module.forward
            if type(module).forward is not stock:
                module.forward = MethodType(stock, module)


def tiled_forward(module: nn.Module) -> TiledForward | None:
    """The object that computes a module in chunks; None for other modules."""
    return getattr(module.__dict__.get("forward"), "tiled", None)  # methods have the attributes of their functions


def chunked(module: nn.Module, kind: type[TiledForward] = TiledForward) -> bool:
    """Whether a module computes in chunks."""
    return isinstance(tiled_forward(module), kind)


def stock_forward(module: nn.Module) -> Forward | None:
    """The function behind a module's bound `forward`; None where somebody has put another object there."""
    forward: Any = module.forward
    return forward.__func__ if getattr(forward, "__self__", None) is module else None


def takes_one_argument(module: nn.Module) -> bool:
    """Whether a module's forward takes hidden states alone."""
    takes = list(inspect.signature(module.forward).parameters.values())
    return len(takes) == 1 and takes[0].kind is takes[0].POSITIONAL_OR_KEYWORD


def find_mlps(model: PreTrainedModel) -> list[nn.Module]:
    """The MLPs of all layers, found by their structure. Raises `UspModelError` where there are none, or others too."""
    from transformers.modeling_layers import GradientCheckpointingLayer  # which loads every auto class

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    mlps = [child for layer in layers for child in layer.children() if _is_mlp(child)]
    if not mlps:
        raise UspModelError(
            f"mlp_chunk_size with {type(model).__name__}, whose layers have no MLP as a module of its own",
            rule="an MLP is a child of a decoder layer, takes hidden states alone and has at least two matrices",
            remedy="leave out mlp_chunk_size",
        )
    for mlp in mlps:
        if any(p.ndim > 2 for p in mlp.parameters()) or any(isinstance(m, nn.ModuleList) for m in mlp.modules()):
            raise _refuse(mlp, "holds experts or convolutions", "leave out mlp_chunk_size for this model")
        if any(isinstance(m, nn.Dropout) and m.p > 0 for m in mlp.modules()):
            raise _refuse(mlp, "drops out values", "set this dropout to 0 in the model's config")
    return mlps


def _is_mlp(module: nn.Module) -> bool:
    return (chunked(module) or takes_one_argument(module)) and sum(p.ndim >= 2 for p in module.parameters()) >= 2


def _refuse(mlp: nn.Module, what: str, remedy: str) -> UspModelError:
    rule = "an MLP in chunks is a function of one token at a time, the same at every call"
    return UspModelError(f"mlp_chunk_size with {type(mlp).__name__}, which {what}", rule=rule, remedy=remedy)


def _check_gathered(mlp: nn.Module) -> None:
    """Refuse weights that are gathered and freed inside the MLP: around all chunks they must stay."""
    weights = [p for p in mlp.parameters() if p.requires_grad]
    inner = any(hasattr(m, "set_reshard_after_forward") for m in mlp.modules() if m is not mlp)
    if inner or any(is_zero3_parameter(p) for p in weights):
        raise _refuse(
            mlp,
            "has weights that are gathered inside it (ZeRO-3, or FSDP2 around single matrices)",
            "wrap whole decoder layers with FSDP2, or use ZeRO-2",
        )
    if any(has_gradient_hooks(p) for p in weights):
        raise _refuse(mlp, "has weights with gradient hooks", "remove them: they would run for every chunk")


class _InChunks(torch.autograd.Function):
    """Forward without a graph, chunk by chunk; backward with the graph of one chunk at a time."""

    @staticmethod
    def forward(  # the weights are inputs for their gradients alone
        ctx: Any, hidden_TD: Tensor, module: nn.Module, stock: Forward, size: int, *weights: Tensor
    ) -> Tensor:
        ctx.save_for_backward(hidden_TD, *weights)
        ctx.module, ctx.stock, ctx.size, ctx.autocast = module, stock, size, autocast_of(hidden_TD)
        first_TD = stock(module, hidden_TD[:, :size])
        out_TD = first_TD.new_empty(1, hidden_TD.shape[1], first_TD.shape[-1])
        out_TD[:, :size] = first_TD
        del first_TD
        for start in range(size, hidden_TD.shape[1], size):
            out_TD[:, start : start + size] = stock(module, hidden_TD[:, start : start + size])
        return out_TD

    @staticmethod
    @forbid_double_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD = ctx.saved_tensors[0]
        module, stock, size, wants = ctx.module, ctx.stock, ctx.size, ctx.needs_input_grad[0]
        weights = [p for p in module.parameters() if p.requires_grad]
        totals: list[Tensor | None] = [None] * len(weights)
        d_hidden_TD = torch.empty_like(hidden_TD) if wants else None
        for start in range(0, hidden_TD.shape[1], size):
            chunk = slice(start, start + size)
            with torch.enable_grad(), ctx.autocast():
                part_TD = hidden_TD[:, chunk].detach().requires_grad_(wants)
                out_TD = stock(module, part_TD)
            inputs = [*([part_TD] if wants else []), *weights]
            found = list(torch.autograd.grad(out_TD, inputs, grads[0][:, chunk], allow_unused=True))
            del out_TD
            if d_hidden_TD is not None:
                d_hidden_TD[:, chunk] = found.pop(0)
            totals = [add_gradient(total, part) for total, part in zip(totals, found, strict=True)]
            del found  # before those of the next chunk are made
        back = [None if total is None else total.to(p.dtype) for total, p in zip(totals, weights, strict=True)]
        return d_hidden_TD, None, None, None, *back


def add_gradient(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """The sum of a weight's gradients over chunks, in fp32 or fp64, with one more; written into the sum before."""
    if part is None:
        return total
    return part.to(accumulation_dtype(part.dtype)) if total is None else total.add_(part)


def autocast_of(tensor: Tensor) -> Autocast:
    """The autocast of the forward, for the backward."""
    kind, dtype = tensor.device.type, autocast_dtype(tensor)
    return nullcontext if dtype is None else lambda: torch.autocast(kind, dtype)
