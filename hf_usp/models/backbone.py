"""The backbone: the module at which a model is sharded. It is the model itself, or a module inside it.

- A causal language model whose loss is a sum over tokens is sharded at itself. Each rank has the logits of its tokens.
- With any other head (classification, question answering, masked tokens ...) the backbone is the base model. Its hidden
  states are gathered. The head and its loss run unchanged, on full sequences, on every rank, so any loss is exact.
- With images the backbone is the language model inside. Every rank computes the vision tower, the token embeddings with
  image features, and the positions in time, height and width for full sequences, and shards them afterwards.

The outermost model decides the layout. The attention mask carries its context to the backbone.

Shape suffixes: B rows, S tokens of a full row, L tokens of a row on this rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ..batch.context import ForwardContext, ShardOptions
from ..batch.layout import CAUSAL, MaskSpec, SequenceLayout
from ..batch.shard import (
    DESCRIBED,
    PER_TOKEN,
    begin_forward,
    get_tokens,
    shard_labels,
    shard_tensor,
    shard_tensors,
    shifted_labels,
    take,
)
from ..batch.sharded_tensors import ContextMask, context_of, make_handle
from ..batch.unshard import unshard
from ..compat import tree_leaves
from ..distributed.mesh import UspMesh
from ..errors import UspBatchError, UspModelError
from ..sharding.masks import UNLIMITED
from .pickling import NotSaved

# Outputs with one entry per token, [B, L, ...] (or tuples of such).
PER_TOKEN_OUTPUTS = ("logits", "last_hidden_state", "hidden_states")
# Inputs that a model around its body prepares, one entry per token, [B, S, ...].
PREPARED = ("per_layer_inputs",)
# Inputs that reach a body and are of no concern there: they belong to the loss of the model around it.
OF_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch")


@dataclass(frozen=True)
class Backbone:
    """The module of a model that is sharded: the model itself, or one inside it.

    Attributes:
        module: that module.
        token_loss: whether the loss is Transformers' ForCausalLMLoss, of which each rank computes a part.
        needs_full_hidden_states: whether a head around the module needs the hidden states of all tokens.
        inside: whether it is a module inside the model. Compilation may replace the model by a copy of itself, so this
            is no question of identity later.
    """

    module: PreTrainedModel
    token_loss: bool
    needs_full_hidden_states: bool
    inside: bool


def find_backbone(model: PreTrainedModel) -> Backbone:
    """Where a model is cut."""
    # Classes whose name tells no loss get ForCausalLMLoss as well, also those that never call it.
    named = getattr(model, "loss_type", None) is not None
    token_loss = model.loss_function is ForCausalLMLoss and (named or model.can_generate()) and not has_own_loss(model)
    is_head = not token_loss and model.base_model is not model
    text, decoder = model.config.get_text_config(), model.get_decoder()
    if text is not model.config and isinstance(decoder, PreTrainedModel) and decoder.config is text:
        return Backbone(decoder, token_loss, is_head, decoder is not model)
    base = model.base_model if is_head and isinstance(model.base_model, PreTrainedModel) else model
    if is_head and isinstance(decoder, PreTrainedModel) and _calls_decoder(model):
        base = decoder
    return Backbone(base, token_loss, is_head, base is not model)


def _calls_decoder(model: PreTrainedModel) -> bool:
    """Whether a model's own forward calls the decoder inside its base model, and not the base model (BART)."""
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    return code is not None and "decoder" in code.co_names


def has_own_loss(model: PreTrainedModel) -> bool:
    """Whether the code of a model's forward computes a cross-entropy itself and never calls `loss_function`.

    Such a loss takes unshifted labels of whole rows (Qwen2-Audio, which leaves out padding before it shifts them).
    """
    names = getattr(getattr(inspect.unwrap(type(model).forward), "__code__", None), "co_names", ())
    return "loss_function" not in names and not {"CrossEntropyLoss", "cross_entropy"}.isdisjoint(names)


def accepts_any_keyword(forward: Callable[..., Any]) -> bool:
    """Whether a forward ends in **kwargs."""
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())


def validate_outer_model(model: PreTrainedModel, body: PreTrainedModel) -> None:
    """Refuse a model around a body that could not send it the context."""
    if accepts_any_keyword(type(model).forward):
        return
    parameters = inspect.signature(type(model).forward).parameters
    for name in ("attention_mask", "position_ids"):
        if name not in parameters:
            raise UspModelError(
                f"{type(model).__name__}.forward takes no {name}",
                rule=f"the layout of a batch reaches {type(body).__name__} with the attention mask, and each rank "
                "passes the positions of its tokens",
                remedy="use an architecture whose forward takes both",
            )


def shard_for_backbone(
    backbone: Backbone,
    model: PreTrainedModel,
    batch: Mapping[str, Any],
    mesh: UspMesh,
    options: ShardOptions,
    check: Callable[[Mapping[str, Any]], None] | None = None,
) -> tuple[dict[str, Any], ForwardContext]:
    """Keywords for `model` that make its body run on this rank's share of a full batch; see `begin_forward`."""
    names = {*PER_TOKEN, *DESCRIBED, "attention_mask"} | (set(OF_THE_LOSS) if backbone.token_loss else set())
    context = begin_forward(batch, mesh, options, check, names if backbone.inside else None)
    if not backbone.inside:
        return {**shard_tensors(batch, context), "use_cache": False}, context
    share = {name: value for name, value in batch.items() if name not in DESCRIBED and value is not None}
    tokens = get_tokens(share)
    mask_BS = share.get("attention_mask")
    if mask_BS is None:
        mask_BS = torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
    share["attention_mask"] = ContextMask.of(mask_BS, make_handle(context))
    if backbone.token_loss:
        share |= shard_labels(shifted_labels(batch), context.layout)
    return share, context


class BackboneHooks(NotSaved):
    """The two hooks of a body inside a prepared model; they hold no state."""

    def __init__(self, body: Backbone, mesh: UspMesh) -> None:
        self.mesh, self.needs_full_hidden_states = mesh, body.needs_full_hidden_states
        self.parameters = list(inspect.signature(type(body.module).forward).parameters)[1:]
        self.handles = (
            body.module.register_forward_pre_hook(self.pre_forward, with_kwargs=True),
            body.module.register_forward_hook(self.post_forward, with_kwargs=True),
        )

    @torch.compiler.disable
    def pre_forward(self, body: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before the body: whole inputs become this rank's share."""
        batch = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        context = context_of(*batch.values())
        if context is None or context.layout.mesh is not self.mesh or "usp" in batch:
            return args, kwargs
        return (), _shard_inputs(body, batch, context)

    @torch.compiler.disable
    def post_forward(self, body: PreTrainedModel, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """After the backbone: gather its hidden states where a head needs them in full."""
        context = context_of(kwargs.get("usp"))
        if context is not None and context.layout.mesh is self.mesh:
            if self.needs_full_hidden_states:
                gather_outputs(output, context.layout)
            recompute_pooler(body, output, context.layout, gathered=self.needs_full_hidden_states)
        return output


def _shard_inputs(body: PreTrainedModel, batch: dict[str, Any], context: ForwardContext) -> dict[str, Any]:
    layout = context.layout
    mask, passed = batch.pop("attention_mask"), {n: batch.pop(n) for n in OF_THE_LOSS if n in batch}
    visual_BS, features = batch.pop("visual_pos_masks", None), batch.pop("deepstack_visual_embeds", None)
    prepared = {name: batch.pop(name) for name in PREPARED if batch.get(name) is not None}
    for name, value in batch.items():
        known = name in PER_TOKEN or name in DESCRIBED
        if not known and any(isinstance(x, Tensor) and x.ndim > 0 for x in tree_leaves(value)):
            raise UspBatchError(
                f"{type(body).__name__} gets the tensor(s) {name}",
                rule="hf_usp shards " + ", ".join(PER_TOKEN) + "; it does not guess how to shard anything else",
                remedy="remove it from the batch, or train this model without UspParallelismConfig",
            )
    if isinstance(mask, ContextMask):
        share = shard_tensors({**batch, "attention_mask": mask.as_subclass(Tensor)}, context)
    else:  # the model around has made its masks, which only pass on the context
        share = {**shard_tensors(batch, context), "attention_mask": mask}
    if visual_BS is not None and features is not None:
        share["visual_pos_masks"], share["deepstack_visual_embeds"] = _shard_features(visual_BS, features, layout)
    share |= {name: shard_tensor(value, layout) for name, value in prepared.items()}
    return {**share, **passed, "use_cache": context.cache is not None}


def _shard_features(
    visual_BS: Tensor, features: Sequence[Tensor], layout: SequenceLayout
) -> tuple[Tensor, list[Tensor]]:
    """Which tokens of this rank are visual [B, L], and their rows of features that list all visual tokens in order."""
    rows_BS = visual_BS.flatten().cumsum(0).view_as(visual_BS) - 1
    visual_BL = shard_tensor(visual_BS, layout, 0)
    rows = shard_tensor(rows_BS, layout)[visual_BL]
    return visual_BL, [take(feature, rows, layout.mesh) for feature in features]


def gather_outputs(output: Any, layout: SequenceLayout, names: Sequence[str] = PER_TOKEN_OUTPUTS) -> None:
    """Put the per-token outputs of a model together, in place."""
    for name in names:
        if output.get(name) is not None:
            output[name] = _gather(output[name], layout)


def _gather(value: Any, layout: SequenceLayout) -> Any:
    return tuple(_gather(x, layout) for x in value) if isinstance(value, tuple | list) else unshard(value, layout)


def recompute_pooler(body: PreTrainedModel, output: Any, layout: SequenceLayout, gathered: bool) -> None:
    """A pooler that looks at single tokens (BERT: the first) saw a share; it pools again from whole hidden states.

    Poolers that work otherwise are left alone: their output differs from one process, which the self-check finds.
    """
    pooler, of_share = getattr(body, "pooler", None), output.get("pooler_output")
    if of_share is None or not isinstance(pooler, torch.nn.Module):
        return
    if len(inspect.signature(pooler.forward).parameters) == 1:
        hidden = output["last_hidden_state"]
        pooled = pooler(hidden if gathered else unshard(hidden, layout))
        if pooled.shape == of_share.shape:
            output["pooler_output"] = pooled


def mask_specs(model: PreTrainedModel) -> tuple[MaskSpec, ...]:
    """The masks of the model's layers as its config tells, one entry a layer. They decide only the order of tokens."""
    config = model.config.get_text_config()
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    causal = {getattr(module, "is_causal", None) for module in find_backbone(model).module.modules()}
    full, sliding = CAUSAL, MaskSpec(window_left=window - 1) if window else CAUSAL
    if not getattr(config, "is_causal", True) or (False in causal and True not in causal):
        full = MaskSpec(UNLIMITED, UNLIMITED)
        sliding = MaskSpec(window, window) if window else full
    by_type = {"sliding_attention": sliding, "chunked_attention": MaskSpec(chunk_size=chunk) if chunk else full}
    types = getattr(config, "layer_types", None)
    if types:
        return tuple(by_type.get(t, full) for t in types)
    return (sliding,) if getattr(config, "use_sliding_window", True) else (full,)
