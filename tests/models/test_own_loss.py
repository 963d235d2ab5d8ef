"""Models that compute a cross-entropy in their own forward, and what the self-check says where only a share fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hf_usp

from ..harness import prepare, step_errors
from ..ranks import Ranks
from ..tiny import SIZES, batch_of, tiny_model

AUDIO = 62  # the token id that stands for a piece of sound


def audio_model(attention: str) -> Any:
    import transformers

    heard = {
        "d_model": 32,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "encoder_layers": 2,
        "num_mel_bins": 8,
        "max_source_positions": 16,
    }
    config = transformers.Qwen2AudioConfig(
        audio_token_index=AUDIO, text_config={**SIZES, "model_type": "qwen2"}, audio_config=heard
    )
    torch.manual_seed(0)
    return transformers.Qwen2AudioForConditionalGeneration._from_config(config, attn_implementation=attention)


def audio_batch(kind: str) -> dict[str, Tensor]:
    batch, sound = batch_of(kind), torch.Generator().manual_seed(1)
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == AUDIO, 3)
    ids[:, 12:20] = AUDIO
    batch.setdefault("attention_mask", torch.ones_like(ids))
    features = torch.randn(2, 8, 32, generator=sound)
    return batch | {
        "input_ids": ids,
        "input_features": features,
        "feature_attention_mask": torch.ones(2, 32, dtype=torch.long),
    }


def with_own_loss(model: Any) -> Any:
    """A second loss of its own beside the model's: each token also predicts the token after next."""
    stock = type(model)

    class TwoAhead(stock):  # type: ignore[misc, valid-type]
        def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
            output = super().forward(input_ids=input_ids, **kwargs)
            if labels is not None:
                logits = output.logits[:, :-2].flatten(0, 1)
                output.loss = torch.nn.functional.cross_entropy(logits, labels[:, 2:].flatten())
            return output

    model.__class__ = TwoAhead
    return model


def errors_of(what: str, kind: str) -> dict[str, float]:
    if what == "audio":
        models, batch = [audio_model(attention) for attention in ("usp", "eager")], audio_batch(kind)
    else:
        models = [with_own_loss(tiny_model("llama", attention)) for attention in ("usp", "eager")]
        batch = batch_of(kind)
    return step_errors(prepare(models[0].train(), 2, 1), models[1].train(), batch)


@pytest.mark.parametrize(("what", "kind"), [("audio", "plain"), ("audio", "right"), ("two ahead", "right")])
def test_a_loss_in_the_forward_is_exact(two_ranks: Ranks, what: str, kind: str) -> None:
    for errors in two_ranks.run(errors_of, what, kind):
        assert max(errors.values()) < 1e-4, {name: e for name, e in errors.items() if not e < 1e-4}


def fails(where: str) -> str:
    """The refusal of a model that fails on a share alone, or on any batch of tokens."""
    model = tiny_model("llama")
    length = 7  # of the self-check's batch on two ranks of a ring

    def fail(module: Any, args: tuple[Tensor]) -> None:
        if where == "anywhere" or args[0].shape[1] != length:
            raise IndexError("no such token")

    model.model.layers[0].mlp.register_forward_pre_hook(fail)
    with pytest.raises(hf_usp.UspModelError) as refusal:
        prepare(model, 2, 1)(**batch_of("plain"))
    return str(refusal.value)


def test_what_fails_on_a_share_alone_does_not_need_more_than_tokens(two_ranks: Ranks) -> None:
    for message in two_ranks.run(fails, "share"):
        assert "when its sequence is sharded, and not on the whole of it: IndexError: no such token" in message
        assert "self_check" not in message, "without the check the same error comes"
    for message in two_ranks.run(fails, "anywhere"):
        assert "fails on a short random batch of tokens: no such token" in message
