"""Activation checkpointing that saves the outputs of attention and of exchanges instead of recomputing them.

Plain checkpointing recomputes a layer in the backward, and with it every message of its forward. With the policy here
the outputs of the attention (and what its backward needs) and the messages that recurrent layers have received stay in
memory, so that the recomputation neither attends nor exchanges again. Per layer and rank that is h units of local
tokens x head width for a pure ring, and 3h + 2m with ulysses, where heads that have travelled are kept too (h query
heads, m = max(kv heads, ulysses degree)).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from ..attention import custom_op as operator  # noqa: F401  registers the operators
from ..compat import checkpoint_function


def save_attention_outputs() -> dict[str, Any]:
    """Keywords of activation checkpointing under which attention is computed and exchanged once.

    `TrainingArguments(activation_checkpointing=True, activation_checkpointing_kwargs=hf_usp.save_attention_outputs())`,
    or `model.activation_checkpointing_enable(hf_usp.save_attention_outputs())`; older Transformers call both
    `gradient_checkpointing`. Also as keywords of `torch.utils.checkpoint.checkpoint`. Only for the kind without
    reentrance (torch refuses `context_fn` with `use_reentrant=True`). With layers that you compile in a loop of your
    own pass `context_fn=hf_usp.memory.activation_checkpointing.contexts`.
    """
    return {"use_reentrant": False, "context_fn": SaveAttentionOutputs("hf_usp.save_attention_outputs")}


def selective_checkpoint_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """The two contexts of `save_attention_outputs`, around the forward and around the recomputation of a layer."""
    ops = torch.ops.hf_usp
    return create_selective_checkpoint_contexts([ops.usp_flash_attn.default, ops.exchange.default])


class SaveAttentionOutputs(str):
    """The `context_fn` of `save_attention_outputs`.

    It is a string as well, because training arguments are written as JSON.
    """

    def __call__(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        return selective_checkpoint_contexts()


def use_plain_function(model: torch.nn.Module) -> None:
    """Let checkpointed layers call a plain function: torch.compile takes no other `context_fn`."""
    for keywords in _checkpointing_keywords(model):
        if isinstance(keywords.get("context_fn"), SaveAttentionOutputs):
            keywords["context_fn"] = selective_checkpoint_contexts


def uses_plain_function(model: torch.nn.Module) -> bool:
    """Whether `use_plain_function` has changed a layer of this model."""
    return any(
        keywords.get("context_fn") is selective_checkpoint_contexts for keywords in _checkpointing_keywords(model)
    )


def restore_context_functions(model: torch.nn.Module) -> None:
    """Undo `use_plain_function`."""
    for keywords in _checkpointing_keywords(model):
        if keywords.get("context_fn") is selective_checkpoint_contexts:
            keywords.update(save_attention_outputs())


def _checkpointing_keywords(model: torch.nn.Module) -> list[dict[str, Any]]:
    functions = [checkpoint_function(module) for module in model.modules()]
    return [function.keywords for function in functions if isinstance(getattr(function, "keywords", None), dict)]
