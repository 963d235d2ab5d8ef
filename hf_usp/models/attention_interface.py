"""The Transformers glue: attn_implementation="usp", its attention function and its mask function.

The context of a sharded forward reaches a layer through what the model hands it: the 2D attention mask carries it to
the mask function, whose result, a `ShardedMask`, the model passes to every layer; the keyword `usp` travels beside it.
Without either, "usp" is ordinary exact attention: Transformers' own sdpa.

Shape suffixes: B rows, L tokens, S keys, H query heads, G kv heads, D key width, E value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..attention.functional import attend, attend_without_mask
from ..batch.context import ForwardContext
from ..batch.layout import MaskSpec, SequenceLayout
from ..batch.sharded_tensors import ShardedMask, context_of
from ..errors import UspMaskError, UspModelError
from ..kernels import Softmax
from ..sharding.masks import UNLIMITED
from ..utils.dtypes import as_autocast
from .compressed_layers import CompressedMask, attend_compressed
from .generation.decode import attend_from_cache, cache_of
from .indexed_attention import IndexedMask, attend_indexed, refuse_lost_selection, selected_index, with_selection
from .mask_interface import usp_mask
from .positions import is_temperature_tuned, with_global_temperature
from .unsharded import refuse_unsharded, tell_of_full_sequences

NAME = "usp"


# Keywords that Transformers passes along and that change nothing about attention itself.
HARMLESS = {
    "cache_position",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "labels",
    "layer_idx",
    "logits_to_keep",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "num_labels",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "seq_idx",
    "shift_labels",
    "use_cache",
    "position_embeddings",
    "token_type_ids",
    "layer_type",
    "output_attentions",
    "is_causal",
}


# Entries of a config's layer types whose layers look across tokens outside attention.
RECURRENT = {"linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba", "recurrent", "linear"}


def usp_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    usp: ForwardContext | SequenceLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of "usp", as `AttentionInterface` calls it: tensors [B, H, L, D], result [B, L, H, E].

    indices, block_indices: keys that the layer has selected (`indexed_attention.selected_index`).
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    context = context_of(attention_mask, usp)
    if context is None and cache_of(attention_mask) is not None:
        _refuse(module, dropout, kwargs)
        if indices is not None or block_indices is not None:
            raise refuse_lost_selection(module, "selects keys of which each rank holds a part")
        inputs = query, key, value, s_aux
        return attend_from_cache(module, inputs, attention_mask, Softmax(scale, softcap)), None
    index = selected_index(module, attention_mask, indices, block_indices, key.shape[2])
    if context is None:
        if index is not None:
            attention_mask = with_selection(attention_mask, index, query.shape[1], key.shape[2])
        return _unsharded(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            sliding_window=sliding_window,
            softcap=softcap,
            s_aux=s_aux,
            **kwargs,
        )
    _refuse(module, dropout, kwargs)
    if context.manual_loop:
        _refuse_recurrent(module)
        _refuse_router_logits(module, kwargs.get("output_router_logits"))
    if is_temperature_tuned(module):
        query = with_global_temperature(query, module, context)
    softmax = Softmax(scale, softcap)
    if isinstance(attention_mask, CompressedMask):
        return attend_compressed(query, key, attention_mask, context, s_aux, softmax.scale), None
    if isinstance(attention_mask, IndexedMask) and attention_mask.selecting:
        if index is None or softcap is not None:
            raise refuse_lost_selection(module, "selects keys and attends to others")
        return attend_indexed(module, query, key, value, attention_mask, context, index, s_aux, softmax.scale), None
    if index is not None:
        raise refuse_lost_selection(module, "selects keys, and hf_usp does not see how")
    q, k, v = as_autocast(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    if isinstance(attention_mask, ShardedMask):
        out = attend((q, k, v, s_aux), attention_mask, softmax)
        if context.cache is not None:
            context.cache.forget(attention_mask.mask_spec)
        return out, None
    mask_spec = _spec_without_mask(module, attention_mask, sliding_window, kwargs.get("is_causal"))
    return attend_without_mask((q, k, v, s_aux), context, mask_spec, softmax), None


def _spec_without_mask(
    module: torch.nn.Module, attention_mask: Any, sliding_window: int | None, is_causal: bool | None
) -> MaskSpec:
    if attention_mask is not None:
        raise UspMaskError(
            f"{type(module).__name__} got a mask of shape {tuple(attention_mask.shape)} in a sharded forward",
            rule="masks come from Transformers' mask functions, which know the layout",
            remedy="pass no 4D attention_mask; describe documents with position_ids that restart",
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    left = UNLIMITED if sliding_window is None else sliding_window - 1
    return MaskSpec(left, 0) if causal else MaskSpec(left, left)


def _refuse(module: torch.nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    name = type(module).__name__
    if dropout:
        raise UspModelError(
            f"{name} asks for attention dropout {dropout}",
            rule="dropped weights would differ from one process, where one mask covers all tokens",
            remedy="set attention_dropout=0.0 in the model's config",
        )
    if kwargs.get("output_attentions"):
        raise no_attention_weights()
    for keyword, value in kwargs.items():
        if value is not None and value is not False and keyword not in HARMLESS:
            raise UspModelError(
                f"{name} passes `{keyword}` to its attention",
                rule="an argument is translated or refused, never ignored",
                remedy="this model cannot be sharded exactly; train it without UspParallelismConfig",
            )


def _refuse_recurrent(module: torch.nn.Module) -> None:
    """In a hand-written loop nobody has prepared a model's recurrent layers."""
    found = recurrent_types(module)
    if found:
        raise UspModelError(
            f"a model with layers of type {', '.join(sorted(set(found)))} in a hand-written loop",
            rule="layers with a state along the sequence exchange tokens, which they do in a prepared model only",
            remedy="call hf_usp.shard_recurrent_layers(model) once before the loop",
        )


def _refuse_router_logits(module: torch.nn.Module, asked: bool | None) -> None:
    """In a hand-written loop nobody adds up what shards do to the load-balancing loss of experts."""
    if getattr(getattr(module, "config", None), "output_router_logits", False) if asked is None else asked:
        raise UspModelError(
            "output_router_logits=True in a hand-written loop",
            rule="the load-balancing loss of a mixture of experts is not a sum over shards; a prepared model makes it "
            "what one process computes",
            remedy="let Accelerator(parallelism_config=UspParallelismConfig(...)).prepare(model) shard the batches, or "
            "set output_router_logits=False",
        )


def recurrent_types(module: torch.nn.Module) -> list[str]:
    """The types of the recurrent layers that a module's configuration names, one entry a layer."""
    config: Any = getattr(module, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    return [name for name in types if name in RECURRENT]


def no_attention_weights() -> UspModelError:
    """The refusal of `output_attentions=True`."""
    return UspModelError(
        "output_attentions=True",
        rule="attention weights never exist as a matrix, and no rank holds them all",
        remedy='set output_attentions=False, or load the model with attn_implementation="eager" in one process',
    )


def _unsharded(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    s_aux: Tensor | None,
    sliding_window: int | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Ordinary attention of one process: sdpa, or the textbook formula for what sdpa cannot (softcap, sinks)."""
    refuse_unsharded(module)
    tell_of_full_sequences(module, query.shape[2], key.shape[2])
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    k_BHSD, v_BHSE = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    s_BHLS = query @ k_BHSD.transpose(2, 3) * scale
    if softcap is not None:
        s_BHLS = torch.tanh(s_BHLS / softcap) * softcap
    causal = kwargs.get("is_causal")
    if (
        attention_mask is None
        and query.shape[2] > 1
        and (getattr(module, "is_causal", True) if causal is None else causal)
    ):
        # sdpa's mask function leaves a plain causal mask to `is_causal`; queries and keys are then the same tokens.
        attention_mask = torch.ones(s_BHLS.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attention_mask is not None and attention_mask.is_floating_point():  # added to scores (`mask_interface`)
        s_BHLS = s_BHLS + attention_mask
        attention_mask = attention_mask > torch.finfo(attention_mask.dtype).min / 2
    elif attention_mask is not None:
        s_BHLS = s_BHLS.masked_fill(~attention_mask, torch.finfo(s_BHLS.dtype).min)
    if s_aux is not None:
        sinks = s_aux.to(s_BHLS.dtype)[None, :, None, None].expand(*s_BHLS.shape[:3], 1)
        s_BHLS = torch.cat([s_BHLS, sinks], dim=-1)
    p_BHLS = s_BHLS.softmax(-1, dtype=torch.float64 if query.dtype == torch.float64 else torch.float32)
    if attention_mask is not None:  # a row that sees nothing (left padding) is zero, as in sdpa
        p_BHLS = p_BHLS * attention_mask.any(-1, keepdim=True)
    p_BHLS = torch.nn.functional.dropout(p_BHLS[..., : key.shape[2]].to(query.dtype), dropout, module.training)
    return (p_BHLS @ v_BHSE).transpose(1, 2).contiguous(), None


def register() -> None:
    """Make `attn_implementation="usp"` known to Transformers; the only global that hf_usp changes."""
    AttentionInterface.register(NAME, usp_attention_forward)
    AttentionMaskInterface.register(NAME, usp_mask)
