"""Positions that models count themselves, computed for the local tokens of a rank.

Most models take `position_ids`, and a rank passes those of its tokens. Four kinds count instead:

- The RoBERTa family counts the tokens of a full row that are no padding, from `padding_idx` on. It has a method for
  that, which gets the full rows before they are cut.
- OPT counts the visible tokens of the attention mask. The self-check finds out whether a model does.
- Llama 4 scales the queries of its layers without rotary embedding by a place that each layer counts from 0. The layer
  has done so with local places when its queries reach the attention function; there they are put right.
- Decoders of BART and its kin number the tokens of a row 0, 1, 2 ..., padding included, and hand the numbers to an
  embedding. In a sharded forward it gets the places of this rank's tokens.

Shape suffixes: B rows, S tokens of a full row, L tokens of a row on this rank, H heads, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..batch.context import ForwardContext
from ..batch.sharded_tensors import context_of
from ..errors import UspModelError
from .pickling import NotSaved


class OwnPositions:
    """The positions of a full batch as a model of the RoBERTa family counts them: `positions(batch)` [B, S].

    Source: `create_position_ids_from_input_ids` of Transformers, after fairseq's `make_positions`.
    """

    def __init__(self, embeddings: nn.Module) -> None:
        self.embeddings = embeddings

    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        counting: Any = self.embeddings
        if batch.get("input_ids") is not None:
            return counting.create_position_ids_from_input_ids(batch["input_ids"], counting.padding_idx)
        return counting.create_position_ids_from_inputs_embeds(batch["inputs_embeds"], counting.padding_idx)


def own_positions(model: nn.Module) -> OwnPositions | None:
    """How a model counts positions where no position_ids are passed; None where it takes 0, 1, 2 ..."""
    for module in model.modules():
        if hasattr(module, "create_position_ids_from_input_ids") and hasattr(module, "padding_idx"):
            return OwnPositions(module)
    return None


def visible_positions(batch: Mapping[str, Any]) -> Tensor | None:
    """Positions that count the visible tokens of the attention mask [B, S], -1 for padding (OPT)."""
    mask = batch.get("attention_mask")
    if mask is None:
        return None
    mask = mask.long()
    return mask.cumsum(1) * mask - 1


def may_count_visible(model: nn.Module) -> bool:
    """Whether an embedding of the model takes the attention mask, so that -1 for padding may be tried on the model."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return any("attention_mask" in inspect.signature(type(module).forward).parameters for module in embeddings)


def place_embeddings(body: nn.Module) -> list[nn.Module]:
    """The embeddings of places in a row, where a module numbers its tokens itself and takes no position_ids."""
    if "position_ids" in inspect.signature(type(body).forward).parameters:
        return []
    embeddings = [module for module in body.modules() if isinstance(module, nn.Embedding)]
    return [m for m in embeddings if "position_ids" in inspect.signature(type(m).forward).parameters]


class PlaceEmbeddings(NotSaved):
    """The embeddings of places in a row inside one prepared backbone."""

    def __init__(self, body: nn.Module) -> None:
        self.context: ForwardContext | None = None
        self.body, self.embeddings = body, place_embeddings(body)
        self.handles = [e.register_forward_pre_hook(self._number, with_kwargs=True) for e in self.embeddings]
        if self.embeddings:
            self.handles.append(body.register_forward_pre_hook(self._enter, with_kwargs=True))

    def release(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.embeddings = []

    def validate_batch(self, batch: Mapping[str, Any]) -> None:
        """Refuse packed documents: one process numbers the tokens of a row, whatever it is told of documents."""
        if not self.embeddings:
            return
        positions = None if batch.get("attention_mask") is not None else batch.get("position_ids")
        restart = positions is not None and bool((positions.diff(dim=-1) != 1).any())
        if restart or batch.get("cu_seq_lens_q") is not None:
            raise UspModelError(
                f"packed documents for {type(self.body).__name__}, which numbers the tokens of a row itself",
                rule="a sharded run equals one process, where only the first document of a row begins at place 0",
                remedy="do not pack",
            )

    @torch.compiler.disable
    def _enter(self, body: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.context = context_of(*args, *kwargs.values())

    @torch.compiler.disable
    def _number(self, embedding: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if self.context is None:
            return None
        device = next(embedding.parameters()).device
        return args, {**kwargs, "position_ids": self.context.layout.local_indices(device)[0]}


def temperature_tuned(model: nn.Module) -> list[nn.Module]:
    """The attention layers of a model that scale their queries by a place that they count themselves (Llama 4)."""
    return [module for module in model.modules() if is_temperature_tuned(module)]


def is_temperature_tuned(module: nn.Module) -> bool:
    return getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True)


def with_global_temperature(query_BHLD: Tensor, module: Any, context: ForwardContext) -> Tensor:
    """Queries that a layer scaled by their local places, scaled by their places in the row instead.

    The scale of place i is log1p(floor((i + 1) / floor_scale)) * attn_scale + 1 (arXiv 2501.19399, as in Llama 4),
    whatever position_ids say.
    """

    def scale(places: Tensor) -> Tensor:
        return torch.log1p(torch.floor((places.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0

    places_L, _ = context.layout.local_indices(query_BHLD.device)
    if context.interception is not None:
        places_L = places_L[context.interception.tokens]
    counted_L = torch.arange(query_BHLD.shape[2], device=query_BHLD.device)
    return (query_BHLD * (scale(places_L) / scale(counted_L))[:, None]).to(query_BHLD.dtype)


LENGTH_DEPENDENT = ("dynamic", "longrope")


def length_dependent_ropes(model: nn.Module) -> list[nn.Module]:
    """The rotary embeddings of a model that look at the sequence length."""
    found = []
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kinds = kind.values() if isinstance(kind, dict) else (kind,)
        if any(isinstance(k, str) and any(name in k for name in LENGTH_DEPENDENT) for k in kinds):
            found.append(module)
    return found
