"""A tiny random model of every causal-LM architecture of the installed Transformers, with the layer kinds it has."""

from __future__ import annotations

import inspect
import itertools
from functools import cache
from itertools import cycle, islice
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .sizes import FAMILIES, SMALL, VARIANTS, VOCABULARY

LAYERS = 4
LENGTH = 29
LARGEST = 8_000_000  # parameters
# Configuration entries with the kind of every layer.
KINDS = ("layer_types", "mlp_layer_types")


def causal_lm_types() -> list[str]:
    """Every model type that `AutoModelForCausalLM` knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def subjects() -> list[str]:
    """The cases of the census: every model type, and "type/variant" for layers that only some checkpoints have."""
    types = causal_lm_types()
    return sorted([*types, *(subject for subject in VARIANTS if subject.split("/")[0] in types)])


def tiny_config(subject: str, **changes: Any) -> Any:
    """A configuration with the family's own defaults wherever they are not sizes, and then the changes."""
    model_type = subject.split("/")[0]
    return _tiny(CONFIG_MAPPING[model_type], FAMILIES.get(model_type, {}) | VARIANTS.get(subject, {}) | changes)


def _tiny(kind: type, family: dict[str, Any]) -> Any:
    """`kind(...)` with small sizes, also in the configurations inside it (for which `family` may hold dicts)."""
    names = set(inspect.signature(kind.__init__).parameters)
    sizes = {name: value for name, value in SMALL.items() if name in names}
    try:
        default = kind()
    except Exception:
        default = None  # a default that its own checks refuse
    for name in KINDS:
        if name in names and getattr(default, name, None):
            kinds = list(dict.fromkeys(getattr(default, name)))
            sizes[name] = list(islice(cycle(kinds), LAYERS)) if name == "layer_types" else _dense_first(kinds)
    if "kv_lora_rank" in names:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]  # latent attention makes a key for every head
    family = dict(family)
    for name in getattr(kind, "sub_configs", {}):
        inner = getattr(default, name, None)
        if inner is not None:
            sizes[name] = _tiny(type(inner), family.pop(name, {})).to_dict()
    return kind(**sizes | family)


def _dense_first(kinds: list[str]) -> list[str]:
    return kinds + kinds[-1:] * (LAYERS - len(kinds))


def layer_kinds(config: Any) -> list[str]:
    """The kinds of layers that a configuration (or the one of its text model) names, in their order."""
    text = config if getattr(config, "layer_types", None) else _text_config(config)
    named = [getattr(text, name, None) or [] for name in ("layer_types", "layers_block_type", "mlp_layer_types")]
    return list(dict.fromkeys(kind for kinds in named for kind in kinds))


def _text_config(config: Any) -> Any:
    try:
        return config.get_text_config()
    except ValueError:  # several of them
        return config


def tiny_model(subject: str, attention: str, **changes: Any) -> Any:
    """A random model, the same in every process, with weights so large that every layer shows in the logits."""
    from transformers import AutoModelForCausalLM

    import hf_usp  # noqa: F401  registers "usp"

    if (size := _parameters(subject)) > LARGEST:
        raise ValueError(f"{size:,} parameters are not tiny")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(subject, **changes), attn_implementation=attention)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(2)
    return model


@cache
def _parameters(subject: str) -> int:
    """How many the subject's model has, without building them."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(tiny_config(subject)).parameters())


DOCUMENTS = (9, 2, 18)  # tokens of the packed documents in each row


def batch_of(form: str) -> dict[str, Any]:
    """Two rows of 29 tokens: plain, one padded on the right or left, or three packed documents in each.

    "plain" comes with a token count of the caller's, "flattened" is packed with what flash attention is told besides.
    """
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[:, :2] = -100
    batch = {"input_ids": ids, "labels": labels}
    if form == "plain":
        batch["num_items_in_batch"] = torch.tensor(37)
    if form in ("packed", "flattened"):
        batch["position_ids"] = torch.cat([torch.arange(n) for n in DOCUMENTS])[None].expand(2, -1).contiguous()
    if form == "flattened":
        edges = torch.tensor([0, *DOCUMENTS * 2]).cumsum(0).to(torch.int32)
        labels.view(-1)[edges[:-1].long()] = -100  # what nobody predicts
        longest = max(DOCUMENTS)
        batch |= {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": longest, "max_length_k": longest}
    if form in ("left", "right"):
        mask = torch.ones_like(ids)
        mask[0, slice(0, 5) if form == "left" else slice(-5, None)] = 0
        labels[mask == 0] = -100
        labels[0, 5] = -100  # predicted from padding where that is on the left: means nothing
        batch["attention_mask"] = mask
    return batch


def documents_of(flattened: dict[str, Any]) -> list[dict[str, Any]]:
    """The documents of a flattened batch, one row each, with the token count of all."""
    edges = flattened["cu_seq_lens_q"].tolist()
    names = ("input_ids", "labels", "position_ids")
    rows = [{name: flattened[name].view(1, -1)[:, a:b] for name in names} for a, b in itertools.pairwise(edges)]
    count = sum((row["labels"][:, 1:] != -100).sum() for row in rows)
    return [{**row, "num_items_in_batch": count} for row in rows]
