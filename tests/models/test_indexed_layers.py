"""Layers that select their keys: how they are cut, what they exchange, what the self-check sees, what is refused.

`test_census.py` compares each architecture with one process in four forms of batches.
"""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

import hf_usp
from hf_usp.attention import selected
from hf_usp.batch.context import ForwardContext
from hf_usp.batch.sharded_tensors import context_of
from hf_usp.callbacks.counting import Seen, StepCounts, count
from hf_usp.models import indexed_layers
from hf_usp.models.indexed_layers import ChunkedIndexer
from hf_usp.models.selfcheck import check
from hf_usp.models.traits import MeasuredTraits

from ..harness import checkpointing
from ..ranks import Ranks
from .census import batch_of, tiny_config, tiny_model
from .verdict import APART, CASES, TOLERANCE, Step, attach_to, gradients_of, step

SHARED = {"indexer_types": ["full", "shared"] * 2}


def contexts(model: Any) -> list[ForwardContext]:
    """The contexts of the forwards from now on, as a layer gets them."""
    seen: list[ForwardContext] = []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        found = context_of(*args, *kwargs.values())
        if found is not None and found not in seen:
            seen.append(found)

    model.model.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    return seen


def selections_by_form() -> dict[str, tuple[int, int, float, StepCounts]]:
    """Usual calls, calls with a selection, error and report of two forms; no document of "packed" has more than 18."""
    found = {}
    reference = tiny_model("glm_moe_dsa", "eager", index_topk=18, **SHARED).train()
    model = tiny_model("glm_moe_dsa", "usp", index_topk=18, **SHARED).train()
    attach_to(model, (2, 2), self_check=True)
    seen = contexts(model)
    for form in ("packed", "plain"):
        expected, got = step(reference, form), step(model, form)
        got.average_gradients()
        context = seen[-1]
        calls = sum(context.attention_calls.values()), sum(context.selections.values())
        counts = StepCounts()
        count(Seen.after_forward(context), counts)
        found[form] = (*calls, expected.largest_error(got), counts)
    return found


def test_documents_no_longer_than_a_selection_take_the_usual_path(four_ranks: Ranks) -> None:
    """The rows of "packed" are longer than what a query may select, its documents are not."""
    for found in four_ranks.run(selections_by_form):
        assert found["packed"][:2] == (4, 0), found
        assert found["plain"][:2] == (0, 4), found
        assert max(error for _, _, error, _ in found.values()) < TOLERANCE, found
        # The report: 16 tokens go to 3 ranks, latents of 24 numbers in 4 layers and back, index keys of 8 in 2 layers.
        counts = found["plain"][3]
        assert counts.sent == 16 * 3 * 4 * (4 * 24 + 4 * 24 + 2 * 8)
        attended, scored = 2 * (18 * 19 // 2 + 11 * 18), 2 * 29 * 30 // 2  # of 2 rows of 29 tokens
        # 4 heads score 24 and weigh 16 numbers; 2 index heads of 8, forward only.
        assert counts.pairs == pytest.approx(4 * 4 * 40 * attended + 2 * 2 * 8 * scored / 3)
        assert 1 <= counts.path / counts.pairs < 2


def in_chunks(kind: str, changes: dict[str, Any], checkpointing: bool) -> dict[str, float]:
    """Errors where the queries of a rank are cut into single ones, with all forms of batches."""
    reference, model = (tiny_model(kind, attention, **changes).train() for attention in ("eager", "usp"))
    if checkpointing:
        model.gradient_checkpointing_enable()
    errors = {}
    with patch.object(selected, "CHUNK_NUMBERS", 1):
        for form in ("plain", "left", "right"):
            hooks = attach_to(model, (4, 1) if form == "left" else (2, 2), self_check=False)
            hooks.traits = replace(hooks.traits, measured=MeasuredTraits(True, False, True))
            expected, got = step(reference, form), step(model, form)
            got.average_gradients()
            errors[form] = expected.largest_error(got)
    return errors


@pytest.mark.parametrize(
    ("kind", "changes", "checkpointing"),
    [("deepseek_v32", {}, False), ("glm_moe_dsa", SHARED, True), ("hy_v4", {}, True)],
    ids=["deepseek_v32", "glm_moe_dsa, checkpointing", "hy_v4, checkpointing"],
)
def test_one_query_at_a_time(four_ranks: Ranks, kind: str, changes: dict[str, Any], checkpointing: bool) -> None:
    for errors in four_ranks.run(in_chunks, kind, changes, checkpointing):
        assert max(errors.values()) < TOLERANCE, errors


# Families without a causal LM of their own, on text -> what their tiny configuration needs.
ON_TEXT: dict[str, dict[str, Any]] = {
    "mistral_large4": {},
    "hy_v4_vl": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    },
}


def image_text_model(kind: str, attention: str) -> Any:
    torch.manual_seed(0)
    config = tiny_config(kind, **copy.deepcopy(ON_TEXT[kind]))
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2 if p.ndim > 1 else 1)
    return model.train()


def on_text(kind: str) -> dict[str, float]:
    """Errors of four forms of batches; the self-check runs on the first."""
    reference, model, errors = image_text_model(kind, "eager"), image_text_model(kind, "usp"), {}
    for form, degrees in CASES.items():
        attach_to(model, degrees, self_check=form == "plain")
        try:
            expected, got = step(reference, form), step(model, form)
        except hf_usp.UspModelError as refusal:
            assert APART in str(refusal), refusal
            continue
        got.average_gradients()
        errors[form] = expected.largest_error(got)
    return errors


@pytest.mark.parametrize("kind", ON_TEXT)
def test_families_without_a_causal_language_model(four_ranks: Ranks, kind: str) -> None:
    """Hy-V4-VL in one process does not keep documents apart by position_ids."""
    for errors in four_ranks.run(on_text, kind, timeout=60):
        assert max(errors.values()) < TOLERANCE, errors
        assert errors.keys() == CASES.keys() - ({"packed"} if kind == "hy_v4_vl" else set())


ADAPTED = {
    "deepseek_v32": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "wq_b", "wk", "weights_proj"],
    "qwen4_exp_text": ["q_proj", "k_proj", "v_proj", "o_proj", "index_qk_proj", "key_proj", "value_proj", "out_proj"],
}


def with_adapters(family: str) -> float:
    """The largest error with LoRA on attention and indexers, and layers computed again."""
    from peft import LoraConfig, get_peft_model

    models = []
    for attention in ("eager", "usp"):
        torch.manual_seed(0)
        lora = LoraConfig(target_modules=ADAPTED[family], r=4, init_lora_weights=False, task_type="CAUSAL_LM")
        models.append(get_peft_model(tiny_model(family, attention), lora).train())
    reference, model = models
    checkpointing(model, {"use_reentrant": False})
    model.enable_input_require_grads()
    attach_to(model, (2, 2), self_check=True)
    expected, got = step(reference, "right"), step(model, "right")
    got.average_gradients()
    return expected.largest_error(got)


@pytest.mark.parametrize("family", ADAPTED)
def test_adapters_and_checkpointing(four_ranks: Ranks, family: str) -> None:
    for error in four_ranks.run(with_adapters, family, timeout=60):
        assert error < TOLERANCE, error


def under_ddp(unused: bool) -> float:
    """The largest error after two steps under DDP with checkpointing; indexers have no gradient, or are frozen."""
    reference, model = (tiny_model("deepseek_v32", attention).train() for attention in ("eager", "usp"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if not unused and indexed_layers.is_indexer(module):
            module.requires_grad_(False)
    attach_to(model, (2, 1), self_check=False)
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
    expected = step(reference, "plain")
    for _ in range(2):  # what DDP misses in one step shows in the next
        model.zero_grad()
        out = wrapped(**batch_of("plain"))
        out.loss.backward()
    got = Step(out.loss.detach(), out.logits.detach().flatten(0, 1), gradients_of(model))
    return expected.largest_error(got)


@pytest.mark.parametrize("unused", [True, False], ids=["find_unused_parameters", "frozen indexers"])
def test_indexers_without_gradient_under_ddp(two_ranks: Ranks, unused: bool) -> None:
    for error in two_ranks.run(under_ddp, unused, timeout=60):
        assert error < TOLERANCE, error


def verdict_of_broken(short_only: bool) -> str:
    """The verdict of the self-check on a model that attends to other keys than those that it has selected."""
    model = tiny_model("deepseek_v32", "usp", index_topk=2048).eval()
    honest = ChunkedIndexer._select

    def others(*args: Any) -> torch.Tensor:
        return (honest(*args) + 1) % 4

    alone = patch.object(check, "small_selections", lambda model: nullcontext(False))
    with patch.object(ChunkedIndexer, "_select", others), alone if short_only else nullcontext():
        attach_to(model, (2, 2), self_check=True)
        try:
            with torch.no_grad():
                model(**batch_of("packed"))
        except hf_usp.UspModelError as refusal:
            return str(refusal)
    return "passed"


def test_the_self_check_sees_a_selection(four_ranks: Ranks) -> None:
    """Its row is shorter than what a query may select, so it makes selections small: else it would see none."""
    for message in four_ranks.run(verdict_of_broken, False):
        assert "the first module whose output differs is model.layers.0" in message, message
    assert four_ranks.run(verdict_of_broken, True) == ["passed"] * 4


@pytest.mark.parametrize("kind", ["glm_moe_dsa", "qwen4_exp_text"])
def test_one_process_computes_in_chunks(kind: str) -> None:
    """On a mesh of one rank each indexer makes its keys, and selects for one query after the other."""
    reference, model = (tiny_model(kind, attention).train() for attention in ("eager", "usp"))
    hf_usp.apply_context_parallel(model, hf_usp.UspMesh.build(ring_degree=1, ulysses_degree=1))
    calls: list[int] = []
    for indexer in (module for module in model.modules() if indexed_layers.is_indexer(module)):
        chunked = indexer.forward.__func__
        chunked.original = lambda *a, stock=chunked.original, **k: (calls.append(1), stock(*a, **k))[1]
    expected = step(reference, "right")
    step(model, "right")  # the self-check
    calls.clear()
    with patch.object(selected, "CHUNK_NUMBERS", 1):
        got = step(model, "right")
    assert expected.largest_error(got) < TOLERANCE
    layers = sum(map(indexed_layers.is_indexer, model.modules()))
    assert len(calls) == layers * (29 + 1)
    hf_usp.remove_context_parallel(model)
    assert not any("forward" in module.__dict__ for module in model.modules() if indexed_layers.is_indexer(module))


def test_one_process_heeds_a_selection() -> None:
    """Outside of a sharded forward "usp" folds `indices` and `block_indices` into the mask of sdpa."""
    for kind in ("deepseek_v32", "hy_v4", "minimax_m3_vl_text"):
        eager, usp = (tiny_model(kind, attention).eval() for attention in ("eager", "usp"))
        ids = batch_of("plain")["input_ids"]
        torch.testing.assert_close(usp(input_ids=ids).logits, eager(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_what_is_no_selection_is_refused() -> None:
    for result in (torch.rand(1, 2, 3), (torch.zeros(1, 2, 3, dtype=torch.int32), torch.rand(1))):
        with pytest.raises(hf_usp.UspModelError, match="something else than indices"):
            indexed_layers._as_index(nn.Identity(), result)


def test_dropout_of_an_adapter_inside_the_expansion_is_refused() -> None:
    layer = tiny_model("deepseek_v32", "usp").train().model.layers[0].self_attn
    indexed_layers.refuse_dropout(layer)
    layer.kv_b_proj = nn.Sequential(layer.kv_b_proj, nn.Dropout(0.1))
    with pytest.raises(hf_usp.UspModelError, match=r"dropout 0.1 inside kv_b_proj"):
        indexed_layers.refuse_dropout(layer)
    layer.kv_b_proj[1].p = 0.0  # the remedy
    indexed_layers.refuse_dropout(layer)


def test_layers_are_put_back_and_copies_are_theirs() -> None:
    model = tiny_model("deepseek_v32", "usp")
    plain = {name: set(module.__dict__) for name, module in model.named_modules()}
    layers = indexed_layers.IndexedLayers(model)
    attention = model.model.layers[0].self_attn
    assert isinstance(attention.indexer.forward.__func__, ChunkedIndexer) and "expand_kv" in attention.__dict__
    twin = copy.deepcopy(model).model.layers[0].self_attn
    assert twin.indexer.forward.__self__ is twin.indexer and twin.expand_kv.__self__ is twin
    loaded = pickle.loads(pickle.dumps(model))
    assert loaded(batch_of("plain")["input_ids"]).logits.shape[-1] == 96
    layers.release()
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == plain
    assert not attention._forward_pre_hooks
