"""Sizes of the tiny models: by the names that configurations use, and what single families need besides."""

from __future__ import annotations

from typing import Any

VOCABULARY = 96

# Tried wherever a configuration, or a configuration inside it, has the name.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32, "embedding_size": 32, "word_embed_proj_dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "d_ff": 48,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "intermediate_size_mlp": 48,
    "num_hidden_layers": 4, "n_layer": 4, "num_layers": 4, "n_layers": 4, "decoder_layers": 2, "encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "num_heads": 4, "n_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8,
    "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "max_seq_len": 128,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_k": 2, "top_k_experts": 2,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "sliding_window": 6, "attention_chunk_size": 8, "attention_window_size": 6, "local_attention": 6, "window_size": 6,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "mamba_d_state": 8,
    "ssm_state_size": 8, "state_size": 8, "n_groups": 1, "mamba_n_groups": 1, "expand": 2, "mamba_expand": 2,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0,
    "rotary_dim": 8, "lru_width": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "attention_dropout": 0.0, "attn_pdrop": 0.0, "attention_probs_dropout_prob": 0.0, "use_cache": False,
    "index_topk": 8, "index_n_heads": 2, "index_head_dim": 8,
    "output_router_logits": False, "is_decoder": True, "floor_scale": 8,
    # Parts that do not see the text.
    "image_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 32, "hidden_dim": 32, "out_hidden_size": 32,
}  # fmt: skip

MIXED = ["full_attention", "sliding_attention"] * 2
HYBRID = ["linear_attention", "full_attention"] * 2
WINDOWS = {"layer_types": MIXED, "use_sliding_window": True}
BY_LAYER_TYPE = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in MIXED}
QWEN4 = {
    "ple_layer_ids": [1], "ple_embed_dim": 32, "hc_lowrank": 8, "ngram_vocab_size_base": 97, "split_ngram_parts": 4,
    "heads_per_ngram": 2, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}  # fmt: skip
DOTS3 = {
    "num_key_value_heads": 4, "head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 16,
}  # fmt: skip

# What single families need, and the layer kinds that a family has but its default configuration lacks.
FAMILIES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"hidden_size_global": 32}, "decoder_config": {"hidden_size_global": 32},
    },
    "cohere_compass_text": {"layer_types": MIXED, "rope_parameters": BY_LAYER_TYPE},
    "dbrx": {
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 10000.0}, "ffn_config": {"ffn_hidden_size": 48},
    },
    "deepseek_v4": {
        "layer_types": [
            "sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention",
        ]
    },
    "dots1": {"layer_types": MIXED},
    "dots3_note": {
        "text_config": DOTS3,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": DOTS3,
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "laguna": {"layer_types": MIXED},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {
        "num_layers": 2, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 24, "zero_expert_num": 2, "moe_topk": 2,
    },
    "mellum": {"layer_types": MIXED},
    "mamba2": {"num_heads": 8},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 8,
            "max_position_embeddings": 128, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        }
    },
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "ministral": {"layer_types": MIXED},
    "qwen2": WINDOWS,
    "qwen2_moe": WINDOWS,
    "qwen3": WINDOWS,
    "qwen3_moe": {"use_sliding_window": True},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "reformer": {
        "is_decoder": True, "attention_head_size": 8, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16],
        "feed_forward_size": 48, "attn_layers": ["local", "lsh"] * 2, "num_buckets": 2,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 8, "pronunciation_vocab_size": 96, "shape_embed_dim": 8, "shape_vocab_size": 96,
    },
    "smollm3": WINDOWS,
    "xlm": {"emb_dim": 32, "causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"] * 2, "router_hidden_size": 16},
}  # fmt: skip

LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
}  # fmt: skip
# The same architectures with other layers, as some of their checkpoints have them: type/variant -> changes.
VARIANTS: dict[str, dict[str, Any]] = {
    "bert/both directions": {"is_decoder": False},
    "gemma4_text/experts": {"enable_moe_block": True},
    "gemma4_text/shared keys": {"num_kv_shared_layers": 2},
    "gpt_bigcode/key of each head": {"multi_query": False},
    "llama/dynamic rope": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        "max_position_embeddings": 20,
    },
    "phi3/longrope": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 20},
    "qwen3_next/no linear layers": {"layer_types": ["full_attention"] * 4},
}
