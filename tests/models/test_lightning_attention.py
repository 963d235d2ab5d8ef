"""Lightning attention and embeddings of places: what is put on a model and taken off, and what is refused.

`test_census.py` compares the families with one process, and sees that without these parts they are wrong.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_usp
from hf_usp.models.lightning_attention import LightningAttention
from hf_usp.models.positions import PlaceEmbeddings

from ..ranks import Ranks
from .census import batch_of, tiny_model
from .verdict import TOLERANCE, attach_to, step


def dropped(checkpoints: bool) -> float:
    """The error of MiniMax on one head for each rank, three heads on four ranks, layers computed again."""
    changes = {"num_attention_heads": 3, "num_key_value_heads": 3, "block_size": 4}
    reference, model = (tiny_model("minimax", attention, **changes).train() for attention in ("eager", "usp"))
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    attach_to(model, (4, 1), self_check=False)
    expected, got = step(reference, "plain"), step(model, "plain")
    got.average_gradients()
    return expected.largest_error(got)


def test_fewer_heads_than_ranks_and_checkpointing(four_ranks: Ranks) -> None:
    for error in four_ranks.run(dropped, True, timeout=60):
        assert error < TOLERANCE, error


@pytest.mark.parametrize("kind", ["minimax", "bart"])
def test_layers_are_put_back(kind: str) -> None:
    model: Any = tiny_model(kind, "usp")
    body = model.get_decoder() if kind == "bart" else model
    part: Any = PlaceEmbeddings(body) if kind == "bart" else LightningAttention(model)
    touched = part.embeddings if kind == "bart" else part.layers
    assert touched and all("forward" in m.__dict__ or m._forward_pre_hooks for m in touched)
    touched = [*touched, body]
    part.release()
    assert not any("forward" in m.__dict__ or m._forward_pre_hooks for m in touched)


def test_packed_documents_are_refused_where_a_model_numbers_tokens_itself() -> None:
    places = PlaceEmbeddings(tiny_model("bart", "usp").get_decoder())
    for form in ("packed", "flattened"):
        with pytest.raises(hf_usp.UspModelError, match="numbers the tokens of a row itself"):
            places.validate_batch(batch_of(form))
    for form in ("plain", "left", "right"):  # the remedy
        places.validate_batch(batch_of(form))
    counted = batch_of("left")["attention_mask"].cumsum(1) - 1
    places.validate_batch({**batch_of("left"), "position_ids": counted.clamp_min(0)})


def test_padding_adds_nothing_to_a_state() -> None:
    """Outside of a sharded forward the layer is what it was."""
    eager, usp = (tiny_model("minimax", attention).eval() for attention in ("eager", "usp"))
    LightningAttention(usp)
    with torch.no_grad():
        for form in ("plain", "left"):
            batch = {name: x for name, x in batch_of(form).items() if name in ("input_ids", "attention_mask")}
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            torch.testing.assert_close(usp(**batch).logits[real], eager(**batch).logits[real], atol=1e-4, rtol=1e-4)
