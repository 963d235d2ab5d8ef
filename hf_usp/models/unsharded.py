"""Calls of a prepared model that run unsharded: which are intended, and which are refused.

`generate` needs full sequences, and outside training a full batch gives the numbers of one process. In a training step
a rank that attends to a full batch repeats the work of all other ranks, and a loss or gradient may count once for each
of them. So the layers of a prepared model know that they are prepared and refuse such a call, whoever makes it.
A model that was never prepared is left alone: without hooks nothing is divided or multiplied by the number of ranks,
and each of them computes the numbers of one process.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..batch.shard import get_tokens
from ..distributed.failures import report_failure
from ..distributed.mesh import mesh_in_force
from ..errors import UspBatchError, UspModelError
from ..sharding.intervals import IntArray
from ..utils.autograd import forbid_double_backward

logger = logging.get_logger(__name__)

# Keywords with which models take a cache: since Transformers 5.24 "cache" is what was "past_key_values" (until 5.40).
CACHES = (
    "past_key_values",
    "cache",
    "cache_params",
    "decoder_cache",
    "decoder_past_key_values",
    "encoder_cache",
    "encoder_past_key_values",
    "mems",
    "padding_cache",
    "past_buckets_states",
    "shared_kv_states",
    "speaker_cache",
)
MARK = "_usp_prepared"


def cache_keyword(function: Callable[..., Any]) -> str:
    """The keyword with which a forward takes its cache."""
    return "cache" if "cache" in inspect.signature(function).parameters else "past_key_values"


class Prepared:
    """The mark of a prepared model's layers. A copy of the model is prepared too; loaded from a pickle it is not."""

    def __deepcopy__(self, memo: dict) -> Prepared:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return bool, ()


class PreparedLayers:
    """Modules that refuse to run unsharded in a training step, until `release`."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = [module for module in modules if not getattr(module, MARK, None)]
        for module in self.modules:
            setattr(module, MARK, Prepared())

    def release(self) -> None:
        for module in self.modules:
            delattr(module, MARK)
        self.modules = []

    def __deepcopy__(self, memo: dict) -> PreparedLayers:
        return self


def refuse_unsharded(module: nn.Module) -> None:
    """Refuse a layer of a prepared model that gets a full batch in a training step."""
    if not (torch.is_grad_enabled() and module.training and getattr(module, MARK, None)):
        return
    problem = UspModelError(
        f"{type(module).__name__} of a prepared model gets a full batch in a training step",
        rule="in training each rank computes its share; a part of the model that is called by itself, or beside the "
        "prepared one, would compute the full batch on every rank, and count once for each",
        remedy="call the prepared model itself: model(...), whose logits and hidden states are full without labels, "
        "or with UspParallelismConfig(gather_outputs=True); prepare a second Transformers model by itself "
        "(accelerator.prepare_model); outside training use model.eval() or torch.no_grad()",
    )
    report_failure(problem)
    raise problem


def tell_of_full_sequences(module: nn.Module, queries: int, keys: int) -> None:
    """Say once that a model beside a mesh, which nobody has prepared, runs full sequences on every rank."""
    whole = queries == keys > 1 and not torch.compiler.is_compiling()
    if whole and not getattr(module, MARK, None) and mesh_in_force():
        logger.warning_once(
            f"usp: {type(module).__name__} of a model that is not prepared runs full sequences on every rank. "
            "accelerator.prepare_model(model) or hf_usp.apply_context_parallel(model, mesh) shards them."
        )


def trains(model: PreTrainedModel, batch: Mapping[str, Any] | None = None) -> bool:
    """Whether gradients will flow through a forward of the model, to its parameters or to given embeddings."""
    if not torch.is_grad_enabled():
        return False
    embeddings = (batch or {}).get("inputs_embeds")
    given = isinstance(embeddings, Tensor) and embeddings.requires_grad
    return given or any(parameter.requires_grad for parameter in model.parameters())


def cache_in(batch: Mapping[str, Any]) -> str | None:
    """The keyword with which a call passes a cache, if it does."""
    return next((name for name in CACHES if batch.get(name) is not None), None)


def has_labels(batch: Mapping[str, Any]) -> bool:
    """Whether the model computes a loss. Without labels all that a caller can want are logits and hidden states."""
    return batch.get("labels") is not None or batch.get("shift_labels") is not None


def wants_some_logits(batch: Mapping[str, Any]) -> bool:
    """Whether a call asks for the logits of some tokens only."""
    keep = batch.get("logits_to_keep")
    return keep is not None and not (isinstance(keep, int) and keep == 0)


def is_generation(model: PreTrainedModel, batch: Mapping[str, Any], generating: bool) -> bool:
    """A call outside of training that stays unsharded: within `generate`, or with a cache."""
    if has_labels(batch) or (model.training and trains(model, batch)):
        return False
    return generating or cache_in(batch) is not None


def kept_positions(batch: Mapping[str, Any]) -> IntArray | None:
    """The positions of a row whose logits `logits_to_keep` asks for [K]; None: all.

    Raises `UspBatchError` for positions that no row has, and for those of each row.
    """
    tokens = get_tokens(batch)
    if not wants_some_logits(batch) or not isinstance(tokens, Tensor) or tokens.ndim < 2:
        return None
    keep, length = batch["logits_to_keep"], tokens.shape[1]
    if isinstance(keep, int):
        return np.arange(length)[-keep:]
    try:
        kept = np.arange(length)[keep.cpu().numpy()]
    except IndexError:
        kept = None
    if kept is None or kept.ndim != 1 or keep.ndim != 1:
        raise UspBatchError(
            f"logits_to_keep of shape {tuple(keep.shape)} for rows of {length} tokens",
            rule="logits_to_keep is a number of last tokens or a list of positions, the same ones of every row",
            remedy="pass the positions that any row needs [K], or leave logits_to_keep out and take some of the logits",
        )
    return kept


def check_outside_loss(model: PreTrainedModel, batch: Mapping[str, Any]) -> None:
    """Refuse a call whose outputs, this rank's share, can only serve a loss that is made outside the model."""
    counted = batch.get("num_items_in_batch") is not None
    if not has_labels(batch) and (counted or trains(model, batch)):
        how = "num_items_in_batch (label smoothing, compute_loss_func)" if counted else "gradients"
        raise UspModelError(
            f"{type(model).__name__} with {how} and without labels: a loss will be made outside the model",
            rule="with gather_outputs=False logits and hidden states are this rank's share of the tokens; a loss of "
            "them would be another one on each rank",
            remedy="hand out full logits and hidden states: leave gather_outputs out; or pass labels and take the "
            "model's own loss; or call the model under torch.no_grad()",
        )


def guard_share(name: str, value: Any) -> Any:
    """Outputs that are this rank's share, which refuse a gradient from outside the model: that of another loss."""
    if isinstance(value, tuple | list):
        return tuple(guard_share(name, x) for x in value)
    if not isinstance(value, Tensor) or not value.requires_grad:
        return value
    return _Guard.apply(value, name)


class _Guard(torch.autograd.Function):
    """The tensor itself, and no view of it, of which FSDP2 warns. The model's own loss has its gradient pass by."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, name: str) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.name = name
        return value.detach()

    @staticmethod
    @forbid_double_backward
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient = grads[0]
        if gradient is None or not bool(gradient.any()):  # DDP looks for unused parameters; a loss times 0
            return gradient, None
        raise UspModelError(
            f"a gradient reaches `{ctx.name}`, this rank's share, from outside the model's own loss",
            rule="a loss made outside the model from a share of the tokens would be another one on each rank",
            remedy="hand out full logits and hidden states with UspParallelismConfig(gather_outputs=True); detach() "
            "what is only looked at",
        )
