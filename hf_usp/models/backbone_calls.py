"""Calls of a causal LM's base model by itself, past the model around it: `model.model(input_ids)`.

Trainers that compute log-probabilities or divergences in chunks call it so (TRL's distillation), and apply the LM head
themselves. Its inputs are sharded as those of the model are, and its hidden states come back full, with their gradient.

A call inside a forward of the model is none of these: it carries a context, or belongs to a forward that stays
unsharded (`generate`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..batch.shard import get_tokens
from ..batch.sharded_tensors import context_of
from ..distributed.mesh import UspMesh
from ..errors import UspModelError
from .backbone import Backbone, gather_outputs
from .direct_calls import DirectForwardCalls
from .moe_aux_loss import wants_router_logits
from .pickling import NotSaved
from .unsharded import cache_in


class BackboneCalls(NotSaved):
    """The two hooks on the base model of one model.

    shard: makes keywords for this rank's share of a full batch; told that the base model alone is called.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        backbone: Backbone,
        mesh: UspMesh,
        entry: DirectForwardCalls,
        shard: Callable[[PreTrainedModel, Mapping[str, Any]], dict[str, Any]],
    ) -> None:
        self.model, self.mesh, self.entry, self.shard = model, mesh, entry, shard
        base: Any = model.base_model
        self.parameters = list(inspect.signature(type(base).forward).parameters)[1:]
        self.handles = (
            ()
            if base is model or backbone.needs_full_hidden_states
            else (
                base.register_forward_pre_hook(self.pre_forward, with_kwargs=True),
                base.register_forward_hook(self.post_forward, with_kwargs=True),
            )
        )

    # Not disabled for torch.compile: of calls inside the model they do nothing, and break no graph.
    def pre_forward(self, base: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Before the base model: a full batch becomes this rank's share."""
        return None if context_of(*kwargs.values()) is not None else self._shard(args, kwargs)

    def post_forward(self, base: PreTrainedModel, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """After the base model: full hidden states."""
        context = context_of(*kwargs.values())
        if context is not None and context.of_backbone and context.gathers_outputs:
            if context.layout.mesh is self.mesh:
                gather_outputs(output, context.layout)
        return output

    @torch.compiler.disable
    def _shard(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        batch = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        if self.entry.inside or cache_in(batch) is not None or not isinstance(get_tokens(batch), Tensor):
            return None
        if wants_router_logits(self.model, batch):
            raise UspModelError(
                f"the base model of {type(self.model).__name__} with output_router_logits=True",
                rule="the load-balancing loss of experts is added up over ranks by the model around it",
                remedy="set output_router_logits=False in the model's config, or call the model itself",
            )
        batch.pop("logits_to_keep", None)  # a base model has none
        return (), self.shard(self.model, batch)
