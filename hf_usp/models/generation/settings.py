"""Settings of a call of `generate`, and those of them that are refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...distributed.mesh import UspMesh
from ...errors import UspBatchError, UspConfigError, UspError, UspModelError
from ..backbone import find_backbone
from ..compressed_layers import compresses
from ..indexed_layers import is_indexer
from ..look_back import reach_of
from ..recurrent_layers import recurrent_kernels
from ..unsharded import CACHES
from .cache import ATTENTION, BOTH, NEITHER, STATES, UspCache
from .steps import other_mesh

Given = dict[str, Any]  # the arguments of a call of `generate`, by name
PROMPTS = ("input_ids", "inputs", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")


def setting(model: PreTrainedModel, given: Given, name: str) -> Any:
    """The value of a setting as `generate` finds it: of the call, its config, the model's config; None without any."""
    for source in (given.get("generation_config"), model.generation_config):
        if name in given:
            return given[name]
        if getattr(source, name, None) is not None:
            return getattr(source, name)
    return None


def prompt_of(given: Given) -> Any:
    """The prompts: the tokens, or their embeddings."""
    for name in ("inputs_embeds", "input_ids", "inputs"):
        if given.get(name) is not None:
            return given[name]
    return None


def refuse_prompts(model: PreTrainedModel, given: Given) -> None:
    """Raise for prompts that are none, and for settings that no model can meet."""
    prompt = prompt_of(given)
    if not isinstance(prompt, Tensor) or prompt.ndim < 2 or not prompt.shape[0] * prompt.shape[1]:
        shape = tuple(prompt.shape) if isinstance(prompt, Tensor) else type(prompt).__name__
        raise UspBatchError(
            f"an empty prompt, or none ({shape})",
            rule="generate gets input_ids [batch, tokens] or inputs_embeds [batch, tokens, width]",
            remedy="begin the prompt with the tokenizer's bos token",
        )
    beams, vocabulary = setting(model, given, "num_beams") or 1, model.config.get_text_config().vocab_size
    if beams > vocabulary:
        raise UspConfigError(
            f"num_beams={beams} with a vocabulary of {vocabulary} tokens",
            rule="every beam ends in another token",
            remedy=f"set num_beams to {vocabulary} or less",
        )


def refuse_sharded(model: PreTrainedModel, mesh: UspMesh, given: Given) -> UspError | None:
    """Why prompts of this call cannot be sharded; None where they can."""
    name, backbone = type(model).__name__, find_backbone(model)
    cache = next((given[key] for key in CACHES if given.get(key) is not None), None)
    reason = None
    if backbone.needs_full_hidden_states:
        reason = f"{name}, whose head takes the hidden states of all tokens"
    elif given.get("assistant_model") is not None:
        reason = "an assistant_model"
    elif given.get("custom_generate") is not None:
        reason = "custom_generate"
    elif setting(model, given, "cache_implementation") not in (None, "dynamic"):
        reason = f"cache_implementation={setting(model, given, 'cache_implementation')!r}"
    elif cache is not None and not isinstance(cache, UspCache):
        reason = f"a {type(cache).__name__}"
    if reason is not None:
        return UspModelError(
            f"generate='sharded' with {reason}",
            rule="sharded prompts are kept in a UspCache by attention layers that generate drives alone",
            remedy="use generate='whole', or leave that out",
        )
    return _refuse_settings(model, mesh, given, cache) or refuse_cache_layers(model)


def _refuse_settings(model: PreTrainedModel, mesh: UspMesh, given: Given, cache: Any) -> UspError | None:
    if setting(model, given, "max_time") is not None:
        return UspConfigError(
            f"max_time={setting(model, given, 'max_time')}",
            rule="all ranks stop at the same token; clocks of ranks differ",
            remedy="use max_new_tokens",
        )
    # Not the model's own config, where trainers switch it off for training.
    asked = given["use_cache"] if "use_cache" in given else getattr(given.get("generation_config"), "use_cache", None)
    if asked is False:
        return UspConfigError(
            "use_cache=False in generate",
            rule="sharded prompts are kept in a cache, from which later tokens are decoded",
            remedy="leave use_cache out, or use generate='whole'",
        )
    if cache is not None and cache.mesh.ranks != mesh.ranks:
        return other_mesh(cache, mesh)
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return UspModelError(
            "generate in training mode under activation checkpointing",
            rule="checkpointed layers keep no keys in a cache in training mode",
            remedy="call model.eval() before generate",
        )
    return None


def cache_bytes(model: PreTrainedModel, given: Given) -> int:
    """The keys and values of all rows of a call, at most: as if no layer had a window."""
    config, prompt = model.config.get_text_config(), prompt_of(given)
    copies = max(setting(model, given, name) or 1 for name in ("num_beams", "num_return_sequences"))
    tokens = prompt.shape[1] + (setting(model, given, "max_new_tokens") or 0)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return len(prompt) * copies * tokens * config.num_hidden_layers * 2 * heads * width * model.dtype.itemsize


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on an accelerator, in torch's pool too; None on a CPU."""
    if device.type != "cuda":
        return None
    pool = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + pool


def pad_token(model: PreTrainedModel, given: Given) -> int:
    """The token after the end of a row, as `generate` chooses it."""
    pad, end = setting(model, given, "pad_token_id"), setting(model, given, "eos_token_id")
    found = pad if pad is not None else end
    if isinstance(found, Tensor):
        found = found.flatten().tolist()
    if isinstance(found, list):
        found = found[0] if found else None
    return 0 if found is None else int(found)


def refuse_cache_layers(model: PreTrainedModel) -> UspError | None:
    """Why the prompts of a model cannot be kept in a `UspCache`; None where they can."""
    config = model.config.get_text_config(decoder=True)
    types = list(getattr(config, "layer_types", None) or ())
    unknown = set(types).difference(ATTENTION, STATES, BOTH, NEITHER)
    found = f"layers of type {', '.join(sorted(unknown))}" if unknown else None
    attends, recurs = (sum(kind in (*kinds, *BOTH) for kind in types) for kinds in (ATTENTION, STATES))
    if found is None and (len(recurrent_kernels(model)) != recurs or (types and not attends)):
        found = "whose recurrent layers have states that no other rank gets"
    if found is None and "reuse" in (getattr(config, "kv_sharing_modes", None) or ()):
        found = "layers that reuse keys"
    if found is None and getattr(config, "num_kv_shared_layers", None):
        found = f"num_kv_shared_layers={config.num_kv_shared_layers}"
    if found is None and any(map(_keeps_more, model.modules())):
        found = "whose layers keep more of earlier tokens than keys, values and states"
    if found is None:
        return None
    return UspModelError(
        f"generate='sharded' with {type(model).__name__}, {found}",
        rule="every layer's cache is one of keys and values, of all tokens before or of a sliding window",
        remedy="use generate='whole'",
    )


def _keeps_more(module: Any) -> bool:
    """Index keys, compressed entries, a recurrence of its own, or the last tokens."""
    keeps = compresses(getattr(module, "compressor", None)) or getattr(module, "rg_lru", None) is not None
    return keeps or is_indexer(module) or reach_of(module) > 0
