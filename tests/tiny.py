"""Tiny models and data for tests, the same on every rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Family -> settings that make its layers what they are in the released models.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 9},
    "gemma": {"head_dim": 16},
    "olmo2": {},
}

# Three layers of the gated delta rule and one of full attention.
HYBRID = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

# Queries that select their keys: family -> sizes. Rows of 40 tokens see more than a query may select.
INDEXED: dict[str, dict[str, Any]] = {
    "deepseek_v32": {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 24,
        "mlp_layer_types": ["dense", "sparse"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "index_topk": 8,
        "index_n_heads": 8,
        "index_head_dim": 16,
    },
    "qwen4_exp_text": {
        **HYBRID,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "indexed_attention"],
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "ple_layer_ids": [1],
        "ple_embed_dim": 32,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 97,
        "split_ngram_parts": 4,
        "heads_per_ngram": 2,
        "indexer_n_heads": 8,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
}


def tiny_model(
    family: str = "llama", attention: str = "usp", dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """A small random causal LM, the same weights in every process."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import hf_usp  # noqa: F401  registers "usp"

    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, {}), **changes})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)


def rows(count: int, length: int, ignored: bool = True) -> list[dict[str, list[int]]]:
    """Rows of random tokens; every row ignores another number of labels."""
    made = []
    for i in range(count):
        ids = torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(i)).tolist()
        labels = [-100] * (7 * i % (length // 2) if ignored else 0)
        made.append({"input_ids": ids, "labels": labels + ids[len(labels) :]})
    return made


def batch_of(kind: str, rows_count: int = 2, length: int = 37) -> dict[str, Tensor]:
    """A batch in one of four forms: plain, packed (restarting positions), left or right padded."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 64, (rows_count, length), generator=generator)
    labels = ids.clone()
    labels[:, :5] = -100
    batch = {"input_ids": ids, "labels": labels}
    if kind == "packed":
        parts = [torch.arange(n) for n in (3, 14, 1, 9, length - 27)]
        batch["position_ids"] = torch.cat(parts)[None].expand(rows_count, -1).contiguous()
    if kind in ("left", "right"):
        mask = torch.ones_like(ids)
        for row in range(rows_count):
            pads = 9 - 6 * row
            if kind == "left":
                # The first token of a row is predicted from padding, which means nothing: ignored, as in all forms.
                mask[row, :pads], labels[row, : pads + 1] = 0, -100
            else:
                mask[row, -pads:], labels[row, -pads:] = 0, -100
        batch["attention_mask"] = mask
    return batch


def largest_difference(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest absolute difference over tensors with the same names."""
    assert mine.keys() == theirs.keys()
    return max((mine[name].double() - theirs[name].double()).abs().max().item() for name in mine)


def uneven_rows(count: int) -> list[dict[str, list[int]]]:
    return [{"input_ids": rows(1 + i, 24 + 5 * i % 17)[i]["input_ids"]} for i in range(count)]


def padded(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Padding on the right, with labels of the tokens."""
    longest = max(len(e["input_ids"]) for e in examples)

    def fill(values: list[int], value: int) -> list[int]:
        return list(values) + [value] * (longest - len(values))

    ids = [e["input_ids"] for e in examples]
    return {
        "input_ids": torch.tensor([fill(x, 0) for x in ids]),
        "labels": torch.tensor([fill(x, -100) for x in ids]),
        "attention_mask": torch.tensor([fill([1] * len(x), 0) for x in ids]),
    }
