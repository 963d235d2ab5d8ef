"""Norms in chunks: the bytes of a step in bf16, and norms that cannot compute in chunks, which compute as before."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hf_usp
from hf_usp.integrations.transformers import apply_memory_options
from hf_usp.memory.tiled_mlp import chunked

from ..ranks import Ranks
from ..tiny import tiny_model

HIDDEN, SHORT, LONG = 256, 384, 768
# Heads of 8 and a narrow MLP keep small what has another size beside long sequences of a real model: rotary tables, and
# the fp32 sums of weights' gradients.
SIZES = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 8,
}


def bytes_a_token(ring: int, chunk: int) -> float:
    """Bytes of a checkpointed step in bf16 that grow with a rank's tokens, in bf16 hidden states.

    They are alive in the backward of the last layer, which is computed again: its input and that of the layer below
    are among them.
    """
    from counting import Peak
    from transformers import LlamaConfig, LlamaForCausalLM

    mesh, peaks = hf_usp.UspMesh.build(ring_degree=ring, ulysses_degree=1), []
    for local in (SHORT, LONG):
        config = LlamaConfig(**SIZES)
        llama = LlamaForCausalLM._from_config(config, attn_implementation="usp", dtype=torch.bfloat16).train()
        llama.gradient_checkpointing_enable({"use_reentrant": False})
        apply_memory_options(llama, chunk, chunk, False)
        ids = torch.zeros(1, local * ring, dtype=torch.long)

        def step(llama: Any = llama, ids: torch.Tensor = ids) -> None:
            llama(**hf_usp.shard({"input_ids": ids, "labels": ids}, mesh), use_cache=False).loss.backward()

        step()  # makes the gradients, which stay
        with Peak(x for p in llama.parameters() for x in (p, p.grad) if x is not None) as counted:
            step()
        peaks.append(counted.peak)
    return (peaks[1] - peaks[0]) / ((LONG - SHORT) * HIDDEN * 2)


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing")
def test_bytes_of_a_recomputed_layer_on_one_rank() -> None:
    """Whole norms: 22."""
    assert bytes_a_token(1, 96) <= 10


def test_bytes_of_a_recomputed_layer_on_a_ring(four_ranks: Ranks) -> None:
    """Whole norms: 22."""
    found = four_ranks.run(bytes_a_token, 4, 96)
    assert max(found) <= 14, found


class Norm(nn.Module):
    """A norm; those below cannot compute in chunks."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 32).expand(*shape, 32).clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.square().mean(-1, keepdim=True).rsqrt() * self.weight


class OverTokensNorm(Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(-2, keepdim=True))


class GatedNorm(Norm):
    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x)


class PairNorm(Norm):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) if x.shape[1] == 20 else (super().forward(x), None)


class ChannelsNorm(Norm):
    """Over the values of a channel: its weights belong to another dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.square().mean(-1, keepdim=True).rsqrt() * self.weight[:, None]


def with_hooks() -> Norm:
    norm = Norm()
    norm.weight.register_hook(lambda gradient: gradient * 2)
    return norm


def replaced() -> Norm:
    norm = Norm()
    stock = norm.forward
    norm.forward = lambda x: 2 * stock(x)  # type: ignore[method-assign]
    return norm


CASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tokens": (OverTokensNorm, "other values for some tokens"),
    "gate": (GatedNorm, "more than hidden states"),
    "pair": (PairNorm, "returns more than hidden states"),
    "channels": (ChannelsNorm, "some rows of its input alone"),
    "matrix": (lambda: Norm(20), "more than one value for each entry"),
    "hooks": (with_hooks, "gradient hooks"),
    "replaced": (replaced, "somebody has replaced"),
}


@pytest.mark.parametrize("case", CASES)
def test_other_norms_compute_as_before(case: str, caplog: pytest.LogCaptureFixture) -> None:
    make, said = CASES[case]
    model = tiny_model(attention="eager")
    model.model.norm = norm = make()
    x = torch.randn(1, 20, 32, requires_grad=True)

    def outcome() -> list[torch.Tensor]:
        norm.weight.grad = x.grad = None
        out = norm(x)
        out.square().sum().backward()
        return [out.detach(), x.grad, norm.weight.grad]

    expected = outcome()
    with caplog.at_level(logging.INFO, "hf_usp"):
        apply_memory_options(model, None, 7, False)
        for _ in range(2):
            assert all(map(torch.equal, outcome(), expected))
    assert [said in record.message for record in caplog.records] == [True]


def test_rows_keep_their_order_in_memory() -> None:
    """Heads before tokens, as views of tokens before heads: the output has the same strides, and nothing is copied."""
    model = tiny_model("qwen3", "eager")
    norm = model.model.layers[0].self_attn.q_norm
    x = torch.randn(2, 20, 4, 16).transpose(1, 2)
    expected = norm(x)
    apply_memory_options(model, None, 3, False)
    assert chunked(norm)
    mine = norm(x)
    assert mine.stride() == expected.stride() == x.stride()
    torch.testing.assert_close(mine, expected)
