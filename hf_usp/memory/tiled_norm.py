"""The norms of a model in chunks of tokens, as its MLPs: what a norm computes never exists for all tokens.

A norm of Transformers computes in fp32. In bf16 it keeps an fp32 copy of its input and the normalised values, and its
backward makes five more fp32 tensors: for a long sequence this is the largest part of a recomputed layer. In chunks a
norm keeps its input alone.

Found by name and structure: a module without children, "norm" in the name of its class, with a forward of its own.
torch's own norms are one fused operator and stay as they are. A norm that cannot compute in chunks computes as before,
and the log says so once: this costs memory and nothing else.

Shape suffixes: T tokens, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..compat import has_gradient_hooks, is_zero3_parameter
from .tiled_mlp import TRIED, Forward, TiledForward, TiledMLP, chunked, stock_forward, takes_one_argument

logger = logging.getLogger(__name__)


class TiledNorm(TiledForward):
    """`forward` of one norm, in chunks of as many values as `chunk` hidden states of `width` have."""

    def __init__(self, stock: Forward, chunk: int, width: int, told: set[str]) -> None:
        super().__init__(stock, chunk)
        self.width, self.told = width, told
        self.found: str | None = None  # what the trial found

    @torch.compiler.disable
    def __call__(self, norm: nn.Module, hidden: Tensor) -> Tensor:
        """The norm's output for values of any leading shape. A graph of torch.compile ends here."""
        chunk = self.chunk * max(1, self.width // hidden.shape[-1])  # a norm of heads has several rows a token
        if hidden.shape[:-1].numel() <= chunk:
            return self.stock(norm, hidden)
        # Rows in the order of memory: heads before tokens are a view, and the output has the strides of the input.
        order = sorted(range(hidden.ndim - 1), key=hidden.stride, reverse=True)
        rows = hidden.permute(*order, -1)
        if not self.tried:
            self.found = self._try_rows(norm, rows.detach().flatten(0, -2)[None, :TRIED])
        found = self.found or _hooked(norm)
        if found is not None:
            _tell(norm, found, self.told)
            return self.stock(norm, hidden)
        out = self.in_chunks(norm, rows, chunk)
        return out.permute(*(order.index(i) for i in range(len(order))), -1)

    def _try_rows(self, norm: nn.Module, few_TD: Tensor) -> str | None:
        try:
            return self.try_out(norm, few_TD)
        except RuntimeError:  # weights that do not fit a part of the values
            return "does not compute some rows of its input alone"


def tile_norms(model: PreTrainedModel, chunk: int, but_of: Sequence[nn.Module] = ()) -> list[nn.Module]:
    """Make the norms of a model compute in chunks of so many tokens; returns them. Again changes nothing.

    Norms inside an MLP that computes in chunks stay as they are, and those inside the modules `but_of`.
    """
    mlps = [module for module in model.modules() if chunked(module, TiledMLP)]
    inside = {inner for outer in (*mlps, *but_of) for inner in outer.modules()}
    width, tiled, told = model.config.get_text_config().hidden_size, [], set[str]()
    for norm in model.modules():
        if norm in inside or not _is_norm(norm):
            continue
        if not chunked(norm):
            stock = stock_forward(norm)
            found = _unsuited(norm, stock)
            if stock is None or found is not None:
                _tell(norm, found or "", told)
                continue
            TiledNorm(stock, chunk, width, told).bind(norm)
        tiled.append(norm)
    return tiled


def _is_norm(module: nn.Module) -> bool:
    named = "norm" in type(module).__name__.lower() and next(module.children(), None) is None
    return named and not type(module).forward.__module__.startswith("torch.")


def _unsuited(norm: nn.Module, stock: Forward | None) -> str | None:
    if stock is None:
        return "has a forward that somebody has replaced"
    if not takes_one_argument(norm):
        return "takes more than hidden states"
    if any(p.ndim > 1 for p in norm.parameters()) or next(norm.buffers(), None) is not None:
        return "holds more than one value for each entry of a hidden state"
    return None


def _hooked(norm: nn.Module) -> str | None:
    if any(is_zero3_parameter(p) for p in norm.parameters()):
        return "has weights that are gathered inside it (ZeRO-3)"
    if any(has_gradient_hooks(p) for p in norm.parameters() if p.requires_grad):
        return "has weights with gradient hooks, which would run for every chunk"
    return None


def _tell(norm: nn.Module, found: str, told: set[str]) -> None:
    """Once a model for each kind of norm."""
    message = f"{type(norm).__name__} computes all tokens at once, mlp_chunk_size or not: it {found}"
    if message not in told:
        told.add(message)
        logger.info("usp: %s", message)
