"""`memory="auto"`: each batch in the fastest way to save memory that fits its length.

Before each forward the planner is asked for the way of as many local tokens. Whole layers, with and without activation
checkpointing: the public flag `gradient_checkpointing` of each layer. The rest is in the context of the forward, at
which layers in chunks (`tiled_layer.py`) look: groups of heads, layers that keep attention's output, whether what they
keep is in host memory. So a backward finds the way of its own forward. The loss is computed in chunks in every way, and
so is the final norm.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..batch.shard import get_tokens
from ..batch.sharded_tensors import context_of
from ..compat import checkpoint_function, find_hook_owner
from ..models.pickling import NotSaved
from ..planner.request import PlanRequest
from ..planner.way import Way, told, way_of
from ..planner.workload import Degrees
from .activation_offload import CHECKPOINTING
from .offloader import ActivationOffloader
from .tiled_layer import tiled_layer

logger = logging.getLogger(__name__)


class ChosenMemory(NotSaved):
    """The hook of one model.

    Attributes:
        what: the plan's request, for a row that is replaced by that of each batch.
        ways: rows, their length and whether it is a step of training -> the way.
        telling: whether this rank logs what was chosen.
    """

    def __init__(self, model: PreTrainedModel, what: PlanRequest, degrees: Degrees, telling: bool) -> None:
        from transformers.modeling_layers import GradientCheckpointingLayer  # which loads every auto class

        self.what, self.degrees, self.telling = what, degrees, telling
        self.ways: dict[tuple[int, int, bool], Way] = {}
        self.layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self.enabled = any(layer.gradient_checkpointing for layer in self.layers)
        self.offloader = ActivationOffloader()
        self.handle = model.register_forward_pre_hook(self.begin, with_kwargs=True)

    def remove(self) -> None:
        """The layers are as they were before."""
        self.handle.remove()
        for layer in self.layers:
            layer.gradient_checkpointing = self.enabled

    @torch.compiler.disable
    def begin(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward: its way, on its layers and in its context. Raises `UspConfigError` where nothing fits."""
        context, tokens = context_of(*kwargs.values()), get_tokens(kwargs)
        if context is None and (self.degrees.cp > 1 or not isinstance(tokens, Tensor)):
            return  # generation, or a call of a wrapper
        training = model.training and torch.is_grad_enabled()
        if context is not None:
            rows, length = context.layout.batch, context.layout.local_length * self.degrees.cp
        else:
            rows, length = tokens.shape[:2]
        way = self.way(rows, length, training).job
        if training and way.offload:
            self.offloader.begin(sum(tiled_layer(layer) is not None for layer in self.layers))
        for layer in self.layers:
            if way.input_alone and checkpoint_function(layer) is None:
                getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": False})
            layer.gradient_checkpointing = way.input_alone
            tiled = tiled_layer(layer)
            if tiled is not None:
                tiled.offloader = self.offloader
        if context is not None:
            context.way = way

    def way(self, rows: int, length: int, training: bool) -> Way:
        """Of so many rows of a batch."""
        key = rows, length, training
        if key not in self.ways:
            what = replace(self.what, rows=rows, tokens=length)
            self.ways[key] = way_of(what, self.degrees, training=training)
            if self.telling:
                logger.info("usp: %s", told(what, self.degrees, self.ways[key]))
        return self.ways[key]


def chosen_memory(model: nn.Module) -> ChosenMemory | None:
    """The object that chooses for this model, with `memory="auto"`."""
    return find_hook_owner(model, ChosenMemory)
