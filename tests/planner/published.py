"""Published measurements and shapes that several tests compare with."""

from __future__ import annotations

# USP paper (arXiv 2405.07719 v5): (machine, ranks, tokens, what is timed, {ulysses degree: throughput}).
TABLES = [
    ("a800-nvlink", 16, 65536, "step", {8: 136.3, 4: 137.5, 2: 129.4, 1: 121.8}),
    ("a800-nvlink", 16, 81920, "step", {8: 147.5, 4: 148.9, 2: 140.1, 1: 132.9}),
    ("l20-pcie", 8, 131072, "forward", {8: 2.59, 4: 4.24, 2: 5.48, 1: 5.19}),
    ("l20-pcie", 8, 32768, "forward", {8: 14.3, 4: 32.8, 2: 62.8, 1: 58.4}),
    ("a100-nvlink", 8, 32768, "forward", {8: 136, 4: 133, 2: 133, 1: 114}),
    ("a100-nvlink", 8, 131072, "both", {8: 2.79, 4: 2.77, 2: 2.89, 1: 2.91}),
]


# Rows closer than this are the same row: the tables give three or four digits of one run.
SAME = 0.008


QWEN3_8B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
