"""Models and calls that are refused without running the model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ..batch.documents import is_left_padded
from ..compat import attention_implementation, has_attention_interface
from ..errors import UspModelError
from .attention_interface import NAME, no_attention_weights
from .backbone import accepts_any_keyword, find_backbone, validate_outer_model
from .positions import place_embeddings
from .recurrent_layers import has_recurrent_layers
from .tensor_parallel import check_tensor_parallel
from .traits import MeasuredTraits
from .unsharded import cache_in, has_labels, kept_positions, wants_some_logits


def validate_model(model: PreTrainedModel) -> None:
    """Refuse, at `prepare`, what can be seen without running the model."""
    name, config = type(model).__name__, model.config
    implementation = attention_implementation(config.get_text_config())
    if implementation != NAME:
        raise UspModelError(
            f"{name} with attn_implementation={implementation!r} under UspParallelismConfig",
            rule=f"a model whose sequences are sharded attends with attn_implementation={NAME!r}",
            remedy=f"from_pretrained(..., attn_implementation={NAME!r})",
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UspModelError(
            f"{name} is an encoder-decoder model",
            rule="one sequence of tokens attends to itself",
            remedy="use a decoder-only model",
        )
    check_tensor_parallel(model)
    # A model whose layers all are recurrent has no attention to speak of, and no positions.
    recurrent = has_recurrent_layers(model)
    if not has_attention_interface(type(model)) and not recurrent:
        raise UspModelError(
            f"{name} has attention code of its own",
            rule="the model's attention goes through Transformers' attention interface",
            remedy="use an architecture that does (Llama, Qwen, Mistral, Gemma, OLMo, ...)",
        )
    body = find_backbone(model).module
    if body is not model:
        validate_outer_model(model, body)
    if not accepts_any_keyword(type(body).forward):
        raise UspModelError(
            f"{type(body).__name__}.forward takes no further keywords",
            rule="the layout, shifted labels and num_items_in_batch reach layers and loss through **kwargs",
            remedy="use an architecture whose forward takes **kwargs",
        )
    takes_positions = "position_ids" in inspect.signature(type(body.base_model).forward).parameters
    if not takes_positions and not recurrent and not place_embeddings(body):
        raise UspModelError(
            f"{type(body.base_model).__name__} takes no position_ids",
            rule="each rank passes the positions of its tokens; a model that counts them itself starts at 0 everywhere",
            remedy="use an architecture whose forward takes position_ids",
        )


def validate_call(model: PreTrainedModel, batch: Mapping[str, Any]) -> None:
    """Refuse what this model cannot do with this batch."""
    config = model.config
    cache = cache_in(batch)
    if cache is not None:
        raise UspModelError(
            f"{cache} together with labels, or in a training step",
            rule="a sharded forward sees whole sequences",
            remedy="train without a cache (prefix tuning keeps its prefix there)",
        )
    if wants_some_logits(batch) and has_labels(batch):
        raise UspModelError(
            "logits_to_keep together with labels",
            rule="the model's loss is one over all tokens of its sequences",
            remedy="leave logits_to_keep out, or pass it without labels and make the loss of the logits",
        )
    if batch.get("output_attentions") or getattr(config, "output_attentions", False):
        raise no_attention_weights()
    if batch.get("return_dict") is False:
        raise UspModelError("return_dict=False", rule="a sharded forward returns a ModelOutput", remedy="leave it out")
    if not has_labels(batch):
        kept_positions(batch)
        return
    if model.loss_function is not ForCausalLMLoss and not find_backbone(model).needs_full_hidden_states:
        raise UspModelError(
            f"{type(model).__name__} with labels and the loss {getattr(model.loss_function, '__name__', 'custom')}",
            rule="a loss is a sum over tokens that takes shift_labels and num_items_in_batch (ForCausalLMLoss)",
            remedy="use the model's ForCausalLM class with its own loss function",
        )


def validate_positions(
    model: PreTrainedModel, batch: Mapping[str, Any], measured: MeasuredTraits, recurrent: bool
) -> None:
    """Refuse positions and padding that this model does not read as the layout does."""
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    counts_itself = not measured.knows_left_padding and positions is None
    if counts_itself and is_left_padded(mask):
        raise UspModelError(
            f"left padding without position_ids for {type(model).__name__}",
            rule="this model counts positions in a way of its own unless it gets position_ids",
            remedy="pass position_ids, or pad on the right",
        )
    apart = measured.keeps_documents_apart or mask is not None or batch.get("cu_seq_lens_q") is not None
    if apart or positions is None:
        return
    if positions.ndim == 3 and len(positions) == 4 and recurrent:
        positions = positions[0]  # masks of the models that take four rows heed the first; their recurrences do not
    if positions.ndim == 2 and bool((positions.diff(dim=1) != 1).any()):
        raise UspModelError(
            f"packed documents, told apart by position_ids, for {type(model).__name__}",
            rule="a sharded run equals one process, where masks or recurrent layers of this model ignore "
            "position_ids and documents see each other",
            remedy="pass cu_seq_lens_q as well, which keeps documents apart as flash attention does "
            "(DataCollatorWithFlattening(return_flash_attn_kwargs=True)), or do not pack",
        )
