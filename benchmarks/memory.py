"""Peak memory of a rank when the sequence grows with the ranks: it should not grow."""

from __future__ import annotations

from typing import Any

import torch
from counting import Peak
from transformers import LlamaConfig, LlamaForCausalLM

import hf_usp

PER_RANK = 1024


def peaks(world: int, per_rank: int = PER_RANK) -> list[dict[str, Any]]:
    """Peak bytes of this rank for `per_rank` tokens on each of `world` ranks, as pure ring and as pure ulysses.

    core: one attention call, forward and backward. step: one training step of a small Llama. Counted are the tensors
    alive at once of those that the call makes.
    """
    rows = []
    for ring, ulysses in dict.fromkeys([(world, 1), (1, world)]):
        mesh = hf_usp.UspMesh.build(ring_degree=ring, ulysses_degree=ulysses)
        tokens = per_rank * world
        ids = torch.zeros(1, tokens, dtype=torch.long)
        share = hf_usp.shard({"input_ids": ids, "labels": ids}, mesh)
        rows.append(
            {"ring": ring, "ulysses": ulysses, "tokens": tokens}
            | {"core": _peak_of_core(share, per_rank), "step": _peak_of_step(share)}
        )
    return rows


def _peak_of_core(share: dict[str, Any], tokens: int) -> int:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, tokens, heads, 64, requires_grad=True) for heads in (8, 4, 4))
    gradient = torch.randn_like(q)

    def step() -> None:
        hf_usp.usp_attention(q, k, v, share["usp"]).backward(gradient)

    return _peak(step)


def _peak_of_step(share: dict[str, Any]) -> int:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation="usp")

    def step() -> None:
        model(**share, use_cache=False).loss.backward()

    return _peak(step)


def _peak(step: Any) -> int:
    step()  # plans are made, gradients exist
    with Peak() as memory:
        step()
    return memory.peak


def summarise(rows: list[dict[str, Any]]) -> str:
    """Markdown: the largest rank of every mesh, over the same tokens in one process."""
    meshes = dict.fromkeys((row["ring"], row["ulysses"]) for row in rows)
    worst = {
        m: {x: max(r[x] for r in rows if (r["ring"], r["ulysses"]) == m) for x in ("core", "step")} for m in meshes
    }
    lines = [
        "| ring x ulysses | tokens | attention, MB | over 1x1 | training step, MB | over 1x1 |",
        "| --- " * 6 + "|",
    ]
    for ring, ulysses in meshes:
        mine, alone = worst[ring, ulysses], worst[1, 1]
        cells = [f"{ring}x{ulysses}", str(PER_RANK * ring * ulysses)]
        cells += [text for x in ("core", "step") for text in (f"{mine[x] / 1e6:.2f}", f"{mine[x] / alone[x]:.3f}")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
