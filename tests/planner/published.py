"""Published measurements and shapes that several tests compare with."""

from __future__ import annotations

from typing import NamedTuple

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


class Run(NamedTuple):
    """A published training step on H100s of 80 GB.

    Attributes:
        who: library.
        model: model.
        tokens: tokens of its one row.
        gpus: number of GPUs.
        ulysses: ulysses degree; the rest is a ring.
        kernel: attention kernel.
        seconds: seconds of a step.
        gigabytes: memory of a GPU; None: not published.
    """

    who: str
    model: str
    tokens: int
    gpus: int
    ulysses: int
    kernel: str
    seconds: float
    gigabytes: float | None


# TRL
# 1.16 with Accelerate's ring and FSDP2, one row (guide "Training beyond 1M tokens"; huggingface/trl#6845,
# huggingface/transformers#48324, #48163). UPipe (arXiv 2602.21196): tokens a second and GPU, as seconds.
RUNS = [
    Run("TRL", "Qwen3 8B", 1 << 20, 8, 1, "cudnn", 373.0, 56.2),
    Run("TRL", "Qwen3 8B", 1 << 20, 8, 1, "fa2", 606.0, 56.2),
    Run("TRL", "Qwen3 0.6B", 1 << 20, 8, 1, "cudnn", 137.0, 27.9),
    Run("TRL", "Qwen3 32B", 1 << 20, 8, 1, "cudnn", 1295.0, 60.8),
    Run("TRL", "Qwen3 0.6B", 4 << 20, 8, 1, "cudnn", 2135.0, 73.7),
    Run("TRL", "Qwen3 8B", 2 << 20, 16, 1, "cudnn", 696.0, None),
    Run("TRL", "Qwen3 8B", 4 << 20, 32, 1, "cudnn", 1346.0, None),
    Run("UPipe", "Llama 3 8B", 1 << 17, 8, 8, "fa3", (1 << 17) / 8 / 2280, 21.1),
    Run("UPipe", "Qwen3 32B", 1 << 17, 16, 8, "fa3", (1 << 17) / 16 / 483, 40.0),
]


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
