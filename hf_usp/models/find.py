"""Transformers models inside a module, and which of them attend with "usp"."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from ..compat import attention_implementation
from ..errors import UspModelError
from .attention_interface import NAME
from .traits import inspect_model


def find_model(module: nn.Module) -> PreTrainedModel:
    """The outermost Transformers model in a module (which may be wrapped by PEFT, DDP and the like)."""
    for candidate in module.modules():
        if isinstance(candidate, PreTrainedModel):
            return candidate
    raise UspModelError(
        f"{type(module).__name__} holds no Transformers model",
        rule="UspParallelismConfig prepares Transformers models",
        remedy="for a module of your own use hf_usp.shard and hf_usp.usp_attention",
    )


def layers_beside(model: PreTrainedModel, around: nn.Module) -> Iterator[nn.Module]:
    """Layers of further Transformers models in the module around one that attend with "usp": nobody shards for them."""
    seen = set(model.modules())
    for other in around.modules():
        if isinstance(other, PreTrainedModel) and other not in seen:
            seen.update(other.modules())
            if attends_sharded(other):
                yield from inspect_model(other).backbone.module.modules()


def attends_sharded(module: nn.Module) -> bool:
    """Whether the outermost Transformers model in a module, if there is one, has attn_implementation="usp"."""
    model = next((candidate for candidate in module.modules() if isinstance(candidate, PreTrainedModel)), None)
    return model is not None and attention_implementation(model.config.get_text_config()) == NAME
