"""Outputs of TRL's fused LM head (`model(..., fused_lm_head=True)`) under sharding: one number per token and field.

The fields come back full [B, S], as one process returns them, so that trainers may sum, mask and compare them; they
are small. Those that carry gradients keep them: a loss of full fields is the same on every rank, and the average of its
gradients over ranks is right.

Shape suffixes: B rows, S tokens of a full row, L tokens of a row on this rank, F fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..batch.context import ForwardContext
from ..batch.unshard import unshard
from ..errors import UspModelError
from .moe_aux_loss import wants_router_logits

FUSED = "fused_lm_head"
FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


def validate_fused_head(model: PreTrainedModel, batch: Mapping[str, Any]) -> None:
    """Refuse a fused LM head that would compute a loss of experts from a share of the tokens."""
    if batch.get(FUSED) and wants_router_logits(model, batch):
        raise UspModelError(
            "TRL's fused LM head with output_router_logits=True",
            rule="it computes the load-balancing loss of experts from the tokens it sees, which are a share",
            remedy="set output_router_logits=False in the model's config, or train with Transformers' own Trainer",
        )


def unshard_fields(output: Any, context: ForwardContext) -> Any:
    """The fields of a fused output made full [B, S - 1] (or [B, S] where the caller passed `shift_labels`)."""
    layout = context.layout
    names = [name for name in FIELDS if output.get(name) is not None]
    last = layout.length if context.has_shift_labels else layout.length - 1
    given = {name for name in names if output[name].requires_grad and torch.is_grad_enabled()}
    for name in names:
        if name in given:
            output[name] = unshard(output[name], layout)[:, :last].clone()  # FSDP2 warns of views
    rest = [name for name in names if name not in given]
    if rest:
        fields_BSF = unshard(torch.stack([_as_float(output[name]) for name in rest], dim=-1), layout)
        for name, field_BS in zip(rest, fields_BSF[:, :last].unbind(-1), strict=True):
            output[name] = field_BS.to(output[name].dtype)
    return output


def _as_float(field: Tensor) -> Tensor:
    return field if field.dtype == torch.float64 else field.float()
