"""The longest sequence that trains on one device: the length doubles until memory or time is out."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

import hf_usp


def config_of(small: bool) -> LlamaConfig:
    """0.5 billion parameters in the shape of today's small models; or a toy."""
    sizes: dict[str, Any] = {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
    }
    sizes |= {"num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64}
    if small:
        sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return LlamaConfig(**sizes, max_position_embeddings=1 << 24, use_cache=False)


def make_step(way: str, device: torch.device, small: bool) -> Callable[[int], float]:
    """A function of the length: one step of AdamW on random tokens, returning its loss."""
    with torch.device(device):
        model: Any = LlamaForCausalLM._from_config(
            config_of(small), attn_implementation="sdpa" if way == "plain" else "usp", dtype=torch.bfloat16
        )
    # Transformers 5.23 renames it; 5.17 knows this name alone.
    warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable`")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    if way != "plain":
        config = hf_usp.UspParallelismConfig(cp_size=1, loss_chunk_size=64 if small else 2048)
        model = Accelerator(cpu=device.type == "cpu", parallelism_config=config).prepare(model)

    def step(tokens: int) -> float:
        ids = torch.randint(0, 500, (1, tokens), device=device)
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def longest_steps(device: torch.device, small: bool, left: Callable[[], float]) -> list[dict[str, Any]]:
    """Seconds, memory and outcome of every length, plain Transformers first."""
    found = []
    for way in ("plain", "hf_usp, loss in chunks"):
        step, tokens = make_step(way, device, small), 128 if small else 16384
        while tokens <= (256 if small else 1 << 22) and left() > 20:
            row: dict[str, Any] = {"way": way, "tokens": tokens}
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            try:
                row |= {"loss": step(tokens), "seconds": time.perf_counter() - start, "outcome": "trained"}
            except torch.cuda.OutOfMemoryError:
                row |= {"loss": float("nan"), "seconds": time.perf_counter() - start, "outcome": "out of memory"}
            row["peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
            found.append(row)
            # Four times the attention: the next one must fit into what is left.
            if row["outcome"] != "trained" or 4 * row["seconds"] > left() - 20:
                break
            tokens *= 2
        del step
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found
