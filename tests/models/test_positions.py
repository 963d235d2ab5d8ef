"""Models that count positions themselves: RoBERTa from its padding token, OPT from the mask, Llama 4 in its layers."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch

import hf_usp
from hf_usp.batch.layout import MaskSpec
from hf_usp.batch.sharded_tensors import ShardedMask

from ..harness import prepared
from ..ranks import Ranks
from ..tiny import tiny_model

BERT_SIZES = {"is_decoder": True, "type_vocab_size": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "roberta": {**BERT_SIZES, "pad_token_id": 1},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0, "attention_dropout": 0.0},
    "llama4_text": {
        "head_dim": 8,
        "floor_scale": 4,
        "attention_chunk_size": 16,
        "num_local_experts": 2,
        "intermediate_size_mlp": 64,
        "num_hidden_layers": 4,
        "initializer_range": 0.3,
    },
}


def padded(form: str, pad: int) -> dict[str, torch.Tensor]:
    """Two rows whose padding is the padding token, too: with a mask on the left, or without one, anywhere."""
    ids = torch.randint(3, 64, (2, 21), generator=torch.Generator().manual_seed(1))
    ids[0, :6] = pad
    if form == "no mask":
        ids[1, 9:12] = ids[1, 19:] = pad
    labels = torch.where(ids == pad, -100, ids)
    labels[0, 6] = -100  # predicted from padding: means nothing
    batch = {"input_ids": ids, "labels": labels}
    return batch if form == "no mask" else batch | {"attention_mask": (ids != pad).long()}


def position_errors(family: str, form: str) -> dict[str, float]:
    """Relative errors of the loss and of each gradient of a prepared model."""
    model = prepared(family, **MODELS[family])
    reference = tiny_model(family, "eager", **MODELS[family])
    batch = padded(form, MODELS[family].get("pad_token_id", 0))
    expected, got = reference(**batch), model(**batch)
    expected.loss.backward()
    got.loss.backward()
    theirs = {name: p.grad for name, p in reference.named_parameters()}
    floor = 1e-3 * torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    pairs = {"loss": (got.loss, expected.loss)}
    for (name, gradient), p in zip(theirs.items(), model.parameters(), strict=True):
        pairs[name] = p.grad, gradient
    return {name: ((p - q).norm() / (q.norm() + floor)).item() for name, (p, q) in pairs.items()}


@pytest.mark.parametrize("form", ["no mask", "left"])
@pytest.mark.parametrize("family", MODELS)
def test_positions_are_those_of_one_process(four_ranks: Ranks, family: str, form: str) -> None:
    for errors in four_ranks.run(position_errors, family, form):
        assert not {name: error for name, error in errors.items() if not error < 1e-4}


def embeddings_error() -> float:
    """RoBERTa counts embeddings, which show no padding, from another number on."""
    model = prepared("roberta", **MODELS["roberta"])
    reference = tiny_model("roberta", "eager", **MODELS["roberta"])
    batch = padded("left", 1)
    ids = batch.pop("input_ids")
    embeddings = reference.get_input_embeddings().weight.detach()[ids]
    expected = reference(inputs_embeds=embeddings, **batch).loss
    return (model(inputs_embeds=embeddings, **batch).loss - expected).abs().item()


def test_positions_of_embeddings(four_ranks: Ranks) -> None:
    assert max(four_ranks.run(embeddings_error)) < 1e-5


def refusal_without(name: str, family: str) -> str:
    """The self-check's word when a layer's own count is not put right."""
    with patch(f"hf_usp.models.{name}", lambda first, *rest: first if rest else None):
        try:
            prepared(family, **MODELS[family])(**padded("no mask", 1))
        except hf_usp.UspModelError as error:
            return str(error)
    return "passed"


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("attention_interface.with_global_temperature", "llama4_text"),
        ("traits.own_positions", "roberta"),
    ],
)
def test_the_self_check_sees_counted_positions(four_ranks: Ranks, name: str, family: str) -> None:
    """Also those that change every 8,192 tokens only (floor_scale), and it leaves that number as it was."""
    for message in four_ranks.run(refusal_without, name, family, timeout=40):
        assert "the first module whose output differs" in message, message


def test_a_mask_of_which_nothing_is_cut_off_is_the_mask() -> None:
    mask = ShardedMask(None, MaskSpec())  # type: ignore[arg-type]  # the handle is only carried
    assert mask[:, :, 0:, :] is mask and mask[...] is mask and mask[:, :] is mask
    for index in (0, slice(1, None), (slice(None), 0), (slice(None), torch.tensor([0])), None, slice(None, None, 2)):
        with pytest.raises(hf_usp.UspError, match="attention mask"):
            mask[index]
