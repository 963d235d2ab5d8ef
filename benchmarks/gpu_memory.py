"""Part of `gpu.py` about memory: steps of a model of Llama 3 8B's width, measured, simulated and planned."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from gpu_bench import PLANNED, Bench
from transformers import LlamaConfig, LlamaForCausalLM

import hf_usp
from hf_usp.compat import checkpointing_name
from hf_usp.planner.memory_model import memory
from hf_usp.planner.request import shape_of
from hf_usp.planner.workload import Degrees, TrainingStep
from hf_usp.tools.live_bytes import LiveBytes
from hf_usp.tools.simulate import simulate

SAVINGS: dict[str, dict[str, Any]] = {
    "checkpointing, loss in chunks": {"loss_chunk_size": 2048},
    "and MLPs and norms in chunks": {"loss_chunk_size": 2048, "mlp_chunk_size": 8192},
}


def config_of(small: bool) -> LlamaConfig:
    """Two layers: one computes again while the other's input is kept."""
    sizes: dict[str, Any] = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    if small:
        sizes = {"hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 4, "num_key_value_heads": 2}
    vocabulary = 512 if small else 32768
    return LlamaConfig(**sizes, vocab_size=vocabulary, num_hidden_layers=2, max_position_embeddings=1 << 24)


def step_memory(bench: Bench) -> list[dict[str, Any]]:
    """GB at the peak of a forward and backward without optimizer, weights and gradients included."""
    found = []
    config = config_of(bench.small)
    # A kernel that the planner does not know has no workspace there.
    kernel = PLANNED.get(bench.kernel)
    for name, options in SAVINGS.items():
        sizes = {option: size // 64 for option, size in options.items()} if bench.small else options
        step = _step(bench, config, sizes)
        for tokens in (1024, 2048) if bench.small else (16384, 32768, 65536, 131072):
            if bench.left() < 30:
                break
            job = TrainingStep(tokens, optimizer=0, shard_params=False, checkpointing=True, kernel=kernel, **sizes)
            live = simulate(config, Degrees(1, 1), job, inventory=False)
            found.append(
                {
                    "saving": name,
                    "tokens": tokens,
                    "GB": step(tokens) / 1e9,
                    "predicted (simulated)": (live.there + live.peak) / 1e9,
                    "predicted (planner)": memory(shape_of(config), Degrees(1, 1), job).total / 1e9,
                }
            )
        del step
        gc.collect()
    return found


def _step(bench: Bench, config: LlamaConfig, options: dict[str, Any]) -> Callable[[int], float]:
    """A function of the length: bytes at the peak of a step; NaN where memory does not suffice."""
    cuda = bench.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated() if cuda else 0
    with torch.device(bench.device):
        model: Any = LlamaForCausalLM._from_config(config, attn_implementation="usp", dtype=torch.bfloat16).train()
    getattr(model, f"{checkpointing_name()}_enable")({"use_reentrant": False})
    mesh = hf_usp.UspMesh.build(ring_degree=1, ulysses_degree=1)
    hf_usp.apply_context_parallel(model, mesh, **options)

    def step(tokens: int) -> None:
        model.zero_grad()
        ids = torch.zeros(1, tokens, dtype=torch.int64, device=bench.device)
        model(**hf_usp.shard({"input_ids": ids, "labels": ids}, mesh), use_cache=False).loss.backward()

    def measured(tokens: int) -> float:
        model.zero_grad()
        if not cuda:
            with LiveBytes(model.parameters(), inventory=False) as live:
                step(tokens)
            return live.there + live.peak
        torch.cuda.reset_peak_memory_stats()
        try:
            step(tokens)
        except torch.cuda.OutOfMemoryError:
            return float("nan")
        return torch.cuda.max_memory_allocated() - before

    step(256)  # trials and handles are not part of what is measured
    return measured
