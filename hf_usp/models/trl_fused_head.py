"""Outputs of TRL's fused LM head (`model(..., fused_lm_head=True)`) under sharding: one number per token and field.

The fields come back whole [B, S], as one process returns them, so that trainers may sum, mask and compare them; they
are small. One of them carries gradients, `log_probs`: a loss of it is the same on every rank, and the average of its
gradients over ranks is right. That is shown for the trainers below; other trainers of TRL, which marks the models that
its trainers train (`model.model_tags`), are refused where gradients flow.

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
SUPPORTED = {"sft": "SFTTrainer", "dpo": "DPOTrainer"}


def validate_trl_trainer(model: PreTrainedModel, batch: Mapping[str, Any]) -> None:
    """Refuse a fused LM head that a trainer calls for gradients whose loss is unknown here."""
    if batch.get(FUSED) and wants_router_logits(model, batch):
        raise UspModelError(
            "TRL's fused LM head with output_router_logits=True",
            rule="it computes the load-balancing loss of experts from the tokens it sees, which are a share",
            remedy="set output_router_logits=False in the model's config, or train with Transformers' own Trainer",
        )
    tags = getattr(model, "model_tags", None) or []
    if not batch.get(FUSED) or not torch.is_grad_enabled() or not SUPPORTED.keys().isdisjoint(tags):
        return
    raise UspModelError(
        f"TRL's fused LM head, called by a trainer with the tags {list(tags)}",
        rule=f"its per-token outputs are exact for {' and '.join(SUPPORTED.values())}, and without gradients",
        remedy="use one of these, or run this trainer in one process per sequence",
    )


def unshard_fields(output: Any, context: ForwardContext) -> Any:
    """The fields of a fused output made whole [B, S - 1] (or [B, S] where the caller passed `shift_labels`)."""
    layout = context.layout
    names = [name for name in FIELDS if output.get(name) is not None]
    fields_BLF = torch.stack([_as_float(output[name]).detach() for name in names], dim=-1)
    whole_BSF = unshard(fields_BLF, layout)
    last = layout.length if context.has_shift_labels else layout.length - 1
    for i, name in enumerate(names):
        if name == "log_probs" and torch.is_grad_enabled():
            output[name] = unshard(output[name], layout)[:, :last]
        else:
            output[name] = whole_BSF[:, :last, i].to(output[name].dtype)
    return output


def _as_float(field: Tensor) -> Tensor:
    return field if field.dtype == torch.float64 else field.float()
