"""The hooks that make a model take full batches: `pre_forward` shards the batch, `post_forward` reduces and gathers.

They are registered on the outermost Transformers model, below DDP, FSDP, DeepSpeed or PEFT. The `ForwardContext`
carries everything about one forward. Between calls the hooks keep the traits of the model and the shapes of the last
outputs.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..batch.context import ForwardContext, ShardOptions
from ..batch.layout import locate_tokens
from ..batch.shard import get_tokens, shard_tensor
from ..batch.sharded_tensors import context_of
from ..batch.unshard import unshard_kept
from ..compat import find_hook_owner, tree_leaves
from ..distributed.failures import refuse_after_failure, report_failure
from ..distributed.loss import reduce_loss
from ..distributed.mesh import UspMesh
from ..errors import UspError, UspModelError
from ..kernels import choice_lines, kernel_report
from .attention_interface import NAME
from .backbone import (
    PER_TOKEN_OUTPUTS,
    BackboneHooks,
    gather_outputs,
    recompute_pooler,
    shard_for_backbone,
)
from .backbone_calls import BackboneCalls
from .compressed_layers import CompressedLayers
from .consistency import check_weights
from .direct_calls import DirectForwardCalls
from .find import find_model, layers_beside
from .gated_recurrences import GatedRecurrences
from .generation.cache import UspCache
from .generation.entry import GenerateCalls
from .generation.steps import check_cache, check_padding, number_kept, step_inputs, usp_cache_in
from .indexed_layers import IndexedLayers
from .lightning_attention import LightningAttention
from .look_back import LookBackLayers
from .moe_aux_loss import MoeAuxLoss, wants_router_logits
from .pickling import NotSaved
from .positions import PlaceEmbeddings, visible_positions
from .recurrent_layers import RecurrentLayers
from .selfcheck.check import measure
from .selfcheck.generation import check_generation
from .selfcheck.training import refuse_scaled_noise, training_check
from .tensor_parallel import PartialGradients
from .traits import MeasuredTraits, ModelTraits, inspect_model
from .trl_fused_head import FUSED, unshard_fields, validate_fused_head
from .unsharded import (
    PreparedLayers,
    cache_in,
    check_outside_loss,
    guard_share,
    has_labels,
    is_generation,
    kept_positions,
)
from .validation import validate_call, validate_model, validate_positions

logger = logging.getLogger(__name__)


class ContextParallelHooks(NotSaved):
    """The hooks of one model with context parallelism, in the order of `integrations.transformers.MODEL_CHANGES`."""

    def __init__(
        self,
        model: PreTrainedModel,
        traits: ModelTraits,
        mesh: UspMesh,
        options: ShardOptions,
        *,
        gather_outputs: bool | None,
        self_check: bool,
        generate: str,
        around: nn.Module,
    ) -> None:
        self.traits, self.mesh, self.options, self.gather_outputs = traits, mesh, options, gather_outputs
        self.self_check = self.unchecked_training = self.unchecked_generation = self_check
        self.uncompared = mesh.group is not None  # the weights, with those of the other ranks
        self.parameters = list(inspect.signature(type(model).forward).parameters)[1:]
        self.shares: frozenset[tuple[int, ...]] = frozenset()  # shapes of the last outputs that were left as shares
        self.failed: BaseException | None = None  # what ended a forward or backward on this rank
        self.unlogged = mesh.ring_rank == mesh.ulysses_rank == 0  # the kernels of the first batch
        self.recurrent, self.partial = RecurrentLayers(model), PartialGradients(model)
        self.indexed, self.look_back = IndexedLayers(model), LookBackLayers(model)
        self.compressed, self.gated = CompressedLayers(model), GatedRecurrences(model)
        self.lightning = LightningAttention(model)
        self.backbone = traits.backbone
        self._handles = (
            model.register_forward_pre_hook(self.pre_forward, with_kwargs=True),
            model.register_forward_hook(self.post_forward, with_kwargs=True),
            model.register_forward_hook(self.on_error, with_kwargs=True, always_call=True),
            *(BackboneHooks(self.backbone, mesh).handles if self.backbone.inside else ()),
        )
        self.places = PlaceEmbeddings(self.backbone.module)  # its hook sees the share that ours make
        self.router = MoeAuxLoss(model)  # its hook runs after ours, where both are on one model
        self.layers = PreparedLayers([*self.backbone.module.modules(), *layers_beside(model, around)])
        self.entry = DirectForwardCalls(model)
        self.generation = GenerateCalls(model, mesh, generate, self.entry, self._check_generation)
        self.backbone_calls = BackboneCalls(model, self.backbone, mesh, self.entry, self._shard_backbone)

    def remove(self) -> None:
        for handle in (*self._handles, *self.backbone_calls.handles):
            handle.remove()
        recurrent = (self.recurrent, self.look_back, self.gated, self.lightning)
        for part in (*recurrent, self.indexed, self.compressed, self.partial, self.places):
            part.release()
        self.router.remove()
        self.layers.release()
        self.entry.remove()
        self.generation.remove()

    @torch.compiler.disable
    def pre_forward(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before the forward: the full batch becomes this rank's local batch."""
        batch = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        if "usp" in batch or (self.entry.replaced() and not isinstance(get_tokens(batch), Tensor)):
            return args, kwargs  # the latter is no call of the model: its wrappers run a function of the trainer's
        self.entry.inside = True  # until `on_error`
        cache = usp_cache_in(batch)
        if cache is not None:
            return (), self._from_cache(model, batch, cache)
        if is_generation(model, batch, self.entry.generating):
            return args, kwargs
        return (), self._shard_or_report(model, batch)

    def _from_cache(self, model: PreTrainedModel, batch: dict[str, Any], cache: UspCache) -> dict[str, Any]:
        """Keywords of a prefill, which is sharded, or of new tokens."""
        check_cache(cache, self.mesh, batch)
        if cache.length:
            return step_inputs(batch, cache)
        name = cache_in(batch)
        assert name is not None
        prompt = {key: value for key, value in batch.items() if key not in (name, "use_cache")}
        share = self._shard_or_report(model, prompt)
        context = context_of(*share.values())
        assert context is not None
        mask, layout = batch.get("attention_mask"), context.layout
        check_padding(mask, 0)
        cache.begin_prefill(layout, mask, number_kept(batch, layout.length))
        context.cache, context.gathers_outputs = cache, True
        return {**share, name: cache, "use_cache": True}

    def _shard_backbone(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The local batch for a call of the base model by itself."""
        with self.entry.running():
            share = self._shard_or_report(model, batch)
        context = context_of(*share.values())
        assert context is not None
        context.of_backbone = True
        return share

    def _shard_or_report(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
        if self.failed is not None:
            raise refuse_after_failure(self.failed)
        try:
            with self.entry.closed():
                return self._shard(model, batch)
        except Exception as problem:
            report_failure(problem)  # others may wait for this rank
            if not isinstance(problem, UspError):
                self.failed = problem
            raise

    def _shard(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The local batch of a full batch, after the self-check of the first one."""
        # Not that of the parameters: FSDP2 may keep them on another device than the one it computes on.
        tokens = get_tokens(batch)
        device = tokens.device if isinstance(tokens, Tensor) else next(model.parameters()).device
        if self.uncompared:  # not before: wrappers give all ranks the weights of the first
            check_weights(model, self.mesh, device)
            self.uncompared = False
        measured = self.traits.measured
        if measured is None:
            # Every rank comes here with its first batch, whatever that batch is.
            measured = measure(model, self.traits, self.mesh, self.options, device, self.self_check)
            self.traits = replace(self.traits, measured=measured)
            self.options = replace(
                self.options,
                positions=visible_positions if measured.counts_visible_tokens else self.options.positions,
                pass_states=None if measured.continues_from_states else False,
            )
        if self.unchecked_training and model.training:
            training_check(model, self.mesh, self.options, device)
            self.unchecked_training = False
        items = batch.get("num_items_in_batch")
        share, context = shard_for_backbone(
            self.backbone, model, batch, self.mesh, self.options, lambda b: self._check(model, b, measured)
        )
        num_labels = share.pop("num_labels", None)
        if num_labels is not None:
            share["num_items_in_batch"] = num_labels if items is None else items
        context.gathers_outputs = self._gathers(batch)
        positions_K = None if self.backbone.needs_full_hidden_states else kept_positions(batch)
        if positions_K is not None:
            context.kept = locate_tokens(positions_K, context.layout, device)
            share["logits_to_keep"] = context.kept.local
        context.wants_router_logits = self._wants_router_logits(model, batch)
        if context.wants_router_logits:
            self.router.learn(model, self.mesh, device)
            share["output_router_logits"] = False
        return share

    def _check_generation(self, model: PreTrainedModel) -> None:
        """Before the first sharded generation: it is compared with that of one process."""
        if self.unchecked_generation:
            check_generation(model, self.mesh, model.device, self._from_cache, self.post_forward)
            self.unchecked_generation = False

    def _check(self, model: PreTrainedModel, batch: Mapping[str, Any], measured: MeasuredTraits) -> None:
        """Refuse what this model cannot do with this batch."""
        validate_call(model, batch)
        validate_fused_head(model, batch)
        # Pooled features and the loss of experts are whole as well.
        whole = (
            self.backbone.needs_full_hidden_states
            or getattr(model, "pooler", None) is not None
            or self._wants_router_logits(model, batch)
        )
        if not (whole or self._gathers(batch) or batch.get(FUSED)):
            check_outside_loss(model, batch)
        refuse_scaled_noise(model)
        validate_positions(model, batch, measured, bool(self.recurrent.layers))
        for layers in (self.indexed, self.compressed, self.gated, self.places):
            layers.validate_batch(batch)

    def _gathers(self, batch: Mapping[str, Any]) -> bool:
        """Whether per-token outputs come back full: by default where a caller can want nothing else of the model."""
        return not has_labels(batch) if self.gather_outputs is None else self.gather_outputs

    def _wants_router_logits(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> bool:
        return not self.backbone.needs_full_hidden_states and wants_router_logits(model, batch)

    @torch.compiler.disable
    def on_error(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Torch calls this also when the forward raised: there is no output then."""
        self.entry.inside = False
        problem = sys.exc_info()[1]
        cache = usp_cache_in(kwargs)
        begun = context_of(*kwargs.values()) is not None or (cache is not None and cache.mine is not None)
        if output is None and problem is not None and begun:
            report_failure(problem)
            self.failed = problem

    @torch.compiler.disable
    def post_forward(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """After the forward: the loss of the full batch, and full outputs where they are asked for."""
        context, cache = context_of(*kwargs.values()), usp_cache_in(kwargs)
        if cache is not None:
            cache.finish()
        if context is None or context.layout.mesh is not self.mesh:
            return output
        layout = context.layout
        self.shares = frozenset()
        if not context.reached_a_layer:
            raise UspModelError(
                f"no attention layer of {type(model).__name__} called the attention function {NAME!r}",
                rule="the model's attention goes through Transformers' attention interface",
                remedy="this model has attention code of its own and cannot be sharded; train it without "
                "UspParallelismConfig, or use an architecture that supports attn_implementation='sdpa' as a function",
            )
        if self.unlogged:
            self.unlogged = False
            _log_kernels(context)
        if self.backbone.needs_full_hidden_states:
            return output
        if context.wants_router_logits:
            mask = kwargs["attention_mask"].as_subclass(Tensor)
            output = self.router.add(
                output, layout, shard_tensor(mask, layout, 0) if self.backbone.inside else mask, context.gathers_outputs
            )
        if output.get("loss") is not None:
            output["loss"] = reduce_loss(output["loss"], self.mesh.group, self.mesh.size)
        if kwargs.get(FUSED):
            return unshard_fields(output, context)
        if not self.backbone.inside:
            recompute_pooler(model, output, layout, gathered=False)
        of_all = [name for name in PER_TOKEN_OUTPUTS if output.get(name) is not None]
        if context.kept is not None and "logits" in of_all:
            of_all.remove("logits")
            output["logits"] = unshard_kept(output["logits"], context.kept, layout)
        if context.gathers_outputs:
            gather_outputs(output, layout, of_all)
        else:
            left = {name: output[name] for name in of_all}
            self.shares = frozenset(tuple(x.shape) for x in tree_leaves(left) if isinstance(x, Tensor))
            for name, share in left.items():
                output[name] = guard_share(name, share)
        return output


def _log_kernels(context: ForwardContext) -> None:
    """Which kernels computed attention, why those, and what would be faster."""
    for request, name in context.kernels.items():
        named = context.layout.kernel is not None
        lines = [f"{name}, which kernel= names"] if named else choice_lines(kernel_report(request))
        logger.info("usp: attention in %s, heads of width %s: %s", request.dtype, request.widths, "; ".join(lines))


def attach_hooks(
    module: nn.Module,
    mesh: UspMesh,
    *,
    sequence_order: str = "auto",
    kernel: str | None = None,
    gather_outputs: bool | None = None,
    self_check: bool = True,
    generate: str = "whole",
) -> ContextParallelHooks:
    """Make the Transformers model inside `module` shard its batches over `mesh`. Attaching again replaces the first."""
    model = find_model(module)
    validate_model(model)
    previous = get_hooks(model)
    if previous is not None:
        previous.remove()
    traits = inspect_model(model)
    options = ShardOptions(
        order=sequence_order,
        mask_specs=traits.mask_specs,
        kernel=kernel,
        positions=traits.own_positions,
        largest_position=traits.length_dependent_rope,
        pass_states=False,  # until the model has shown that its kernels continue from states
    )
    return ContextParallelHooks(
        model,
        traits,
        mesh,
        options,
        gather_outputs=gather_outputs,
        self_check=self_check,
        generate=generate,
        around=module,
    )


def get_hooks(module: nn.Module) -> ContextParallelHooks | None:
    """The hooks of a prepared model, if it is one."""
    return find_hook_owner(module, ContextParallelHooks)
