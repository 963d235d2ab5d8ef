"""DeepSeek-V4's compressed entries and RecurrentGemma's recurrence: in chunks, in one process, put back.

`test_census.py` compares them with one process in four forms of batches.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch

import hf_usp
from hf_usp.attention import selected
from hf_usp.models.compressed_layers import CompressedLayers
from hf_usp.models.gated_recurrences import GatedRecurrences

from ..ranks import Ranks
from .census import batch_of, tiny_model
from .verdict import TOLERANCE, attach_to, step


def one_query_at_a_time(form: str) -> float:
    reference, model = (tiny_model("deepseek_v4", attention).train() for attention in ("eager", "usp"))
    attach_to(model, (2, 2), self_check=False)
    with patch.object(selected, "CHUNK_NUMBERS", 1):
        expected, got = step(reference, form), step(model, form)
    got.average_gradients()
    return expected.largest_error(got)


def test_one_query_at_a_time(four_ranks: Ranks) -> None:
    for error in four_ranks.run(one_query_at_a_time, "plain", timeout=60):
        assert error < TOLERANCE, error


@pytest.mark.parametrize("form", ["plain", "right"])
def test_one_process_sees_the_entries_that_eager_sees(form: str) -> None:
    """The model appends what is added to scores to its mask: a boolean one would take -inf for "seen"."""
    batch = {name: x for name, x in batch_of(form).items() if name in ("input_ids", "attention_mask")}
    eager, usp = (tiny_model("deepseek_v4", attention).eval() for attention in ("eager", "usp"))
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    torch.testing.assert_close(usp(**batch).logits[real], eager(**batch).logits[real], atol=1e-5, rtol=1e-4)


def traces_on(model: Any) -> dict[str, Any]:
    """Traces that hooks leave on the modules of a model."""
    modules = model.named_modules()
    return {name: (set(m.__dict__), len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in modules}


LAYERS: dict[str, Any] = {"deepseek_v4": CompressedLayers, "recurrent_gemma": GatedRecurrences}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_are_put_back_and_left_padding_is_refused(kind: str) -> None:
    model = tiny_model(kind, "usp")
    plain = traces_on(model)
    layers = LAYERS[kind](model)
    assert layers.layers
    layers.validate_batch(batch_of("plain"))
    layers.validate_batch(batch_of("right"))
    with pytest.raises(hf_usp.UspModelError, match="left padding"):
        layers.validate_batch(batch_of("left"))
    layers.release()
    assert traces_on(model) == plain
