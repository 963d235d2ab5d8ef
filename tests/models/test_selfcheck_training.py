"""Behaviour of models in training mode only: equal to one process, or refused; chance is held still to see it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

import hf_usp
from hf_usp.models.selfcheck.determinism import DeterministicSampling

from ..harness import prepared
from ..ranks import Ranks
from ..tiny import batch_of, tiny_model
from .spoiled import PeeksAtTheNeighbour


class PeeksInTraining(PeeksAtTheNeighbour):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if self.training else nn.functional.linear(x, self.weight)


class LeavesOut(nn.Linear):
    """Stochastic depth: the whole output of a row is kept or dropped."""

    draw = staticmethod(lambda: torch.rand(1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (self.draw() > 0.2 if self.training else 1.0)


class LeavesOutByPython(LeavesOut):
    draw = staticmethod(random.random)


class Jitters(nn.Linear):
    """Router noise, as Mixtral's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * torch.empty_like(x).uniform_(0.9, 1.1) if self.training else x)


SPOILED = {
    "peeks": PeeksInTraining,
    "leaves out": LeavesOut,
    "leaves out by Python": LeavesOutByPython,
    "jitters": Jitters,
}


def outcome(family: str, spoil: str, training: bool, changes: dict[str, Any]) -> str:
    """The result of the first forward in a mode: a refusal's message, or "passed"."""
    model = prepared(family, **changes)
    if spoil:
        mlp = model.module.model.layers[0].mlp
        new = SPOILED[spoil](mlp.up_proj.in_features, mlp.up_proj.out_features, bias=False)
        mlp.up_proj, new.weight = new, mlp.up_proj.weight
    model.train(training)
    try:
        model(**batch_of("plain")).loss.backward()
    except hf_usp.UspError as error:
        return str(error)
    return "passed"


@pytest.mark.parametrize(
    ("family", "spoil", "changes", "words"),
    [
        ("llama", "peeks", {}, "in training mode, the first module whose output differs is model.layers.0.mlp.up_proj"),
        ("llama", "leaves out", {}, "draws numbers once for many tokens (torch's"),
        ("llama", "leaves out by Python", {}, "draws numbers once for many tokens (Python or numpy's"),
        ("opt", "", {"layerdrop": 0.3, "dropout": 0.0, "attention_dropout": 0.0}, "draws numbers once for many tokens"),
        ("llama", "", {"attention_dropout": 0.1}, "asks for attention dropout 0.1"),
        ("gpt2", "", {"resid_pdrop": 0.0, "embd_pdrop": 0.0}, "asks for attention dropout 0.1"),
    ],
    ids=[
        "peeks",
        "leaves out",
        "leaves out by Python",
        "layer drop",
        "attention dropout",
        "attention dropout of GPT-2",
    ],
)
def test_refused_in_training_mode_alone(
    four_ranks: Ranks, family: str, spoil: str, changes: dict[str, Any], words: str
) -> None:
    for message in four_ranks.run(outcome, family, spoil, True, changes):
        assert words in message or "another rank" in message, message
    assert four_ranks.run(outcome, family, spoil, False, changes) == ["passed"] * 4


@pytest.mark.parametrize(
    ("family", "spoil", "changes"),
    [
        ("llama", "jitters", {}),
        ("gpt2", "", {"attn_pdrop": 0.0}),
        ("opt", "", {"dropout": 0.1, "attention_dropout": 0.0}),
        ("mixtral", "", {"router_jitter_noise": 0.1, "num_local_experts": 4}),
        ("phimoe", "", {"num_local_experts": 4}),
    ],
    ids=["noise", "dropout", "dropout of OPT", "Mixtral's router noise", "PhiMoE's sampled experts"],
)
def test_what_is_drawn_for_each_token_passes(
    four_ranks: Ranks, family: str, spoil: str, changes: dict[str, Any]
) -> None:
    assert four_ranks.run(outcome, family, spoil, True, changes) == ["passed"] * 4


def checkpointed() -> list[bool]:
    """Whether the flags of layers under gradient checkpointing are as before after the first forward in training."""
    model = prepared("llama")
    inner = model.module
    enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
    enable({"use_reentrant": True})
    model.train()
    model(
        inputs_embeds=inner.get_input_embeddings()(batch_of("plain")["input_ids"]), labels=batch_of("plain")["labels"]
    )
    return [layer.gradient_checkpointing and layer.training for layer in inner.model.layers]


def test_checkpointing_stays_on(four_ranks: Ranks) -> None:
    assert four_ranks.run(checkpointed) == [[True, True]] * 4


def test_nothing_is_random_where_chance_is_held_still() -> None:
    x = torch.full((4, 5), 0.7)
    state = [
        lambda: nn.functional.dropout(x, 0.5, True),
        lambda: nn.Dropout(0.5)(x),
        lambda: torch.rand(4, 5),
        lambda: torch.rand_like(x),
        lambda: torch.empty(4, 5).uniform_(-1, 3),
        lambda: torch.randn(4, 5),
        lambda: torch.empty(4, 5).normal_(2.0, 1.0),
        lambda: torch.empty(4, 5).exponential_(),
        lambda: torch.bernoulli(x),
        lambda: torch.empty(4, 5).bernoulli_(0.2),
        lambda: nn.functional.scaled_dot_product_attention(x, x, x, None, 0.5),
        lambda: nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    ]
    means = [0.7, 0.7, 0.5, 0.5, 1.0, 0.0, 2.0, 0.6931, 1.0, 0.0, 0.7, 0.7]
    for draw, mean in zip(state, means, strict=True):
        with DeterministicSampling():
            torch.testing.assert_close(draw(), torch.full((4, 5), mean), atol=1e-4, rtol=0)
    with DeterministicSampling() as seen:
        nn.functional.dropout(x, 0.0, True), nn.functional.dropout(x, 0.5, False), nn.Dropout(0.5).eval()(x)
    assert not seen.drawn and not seen.single
    with DeterministicSampling() as seen:
        torch.rand([])
    assert seen.single


def test_phimoe_samples_its_experts_in_training() -> None:
    """So no two runs of one process agree; with chance held still they do."""
    model = tiny_model("phimoe", "eager", num_local_experts=4).train()
    with DeterministicSampling() as seen:
        first, second = (model(**batch_of("plain")).logits for _ in range(2))
    assert torch.equal(first, second) and seen.drawn
    assert not torch.equal(first, model(**batch_of("plain")).logits)
