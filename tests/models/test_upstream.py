"""Transformers hands to attention only what we know; a release that adds a mask or a keyword turns this red."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import masking_utils
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils import TransformersKwargs

import hf_usp
from hf_usp.batch.context import ForwardContext
from hf_usp.models.attention_interface import HARMLESS, usp_attention_forward
from hf_usp.models.mask_interface import read_mask_function
from hf_usp.sharding.masks import Documents, Mask

LENGTH = 23
LEFT_PADDING = torch.zeros(1, dtype=torch.int64)
# Mask functions that describe layers, with arguments for them.
TRANSLATED: dict[str, tuple[Any, ...]] = {
    "causal_mask_function": (),
    "bidirectional_mask_function": (),
    "sliding_window_causal_mask_function": (6,),
    "sliding_window_bidirectional_mask_function": (6,),
    "chunked_causal_mask_function": (8, LEFT_PADDING),
}
# Parts of these; refused where a model uses them otherwise.
PARTS = {"sliding_window_overlay", "sliding_window_bidirectional_overlay", "chunked_overlay", "blockwise_overlay"}
# Padding and documents: the layout has them, and our mask function is not asked for them.
OF_THE_BATCH = {
    "padding_mask_function",
    "packed_sequence_mask_function",
    "packed_sequence_compatibility_function",
    "add_offsets_to_mask_function",
}
CREATORS = {
    "create_causal_mask",
    "create_bidirectional_mask",
    "create_sliding_window_causal_mask",
    "create_bidirectional_sliding_window_mask",
    "create_chunked_causal_mask",
    "create_recurrent_attention_mask",
    "create_masks_for_generate",
}
# Keywords at the calls of attention in modeling files: those that usp translates, those that it refuses by name, and
# the names of tensors where they are passed by name.
KEYWORDS = {"scaling", "dropout", "sliding_window", "softcap", "s_aux", "is_causal", "query", "key", "value"}
SELECTIONS = {"block_indices": "how large", "indices": "does not see how"}  # translated for layers with an indexer
REFUSED = {"position_bias", "sinks", "deterministic"}


def of_masking_utils(pattern: str) -> set[str]:
    """Functions that Transformers' mask module defines, by a pattern of their names."""
    functions = inspect.getmembers(masking_utils, inspect.isfunction)
    return {name for name, f in functions if f.__module__ == masking_utils.__name__ and re.fullmatch(pattern, name)}


def test_no_mask_function_is_new() -> None:
    known = TRANSLATED.keys() | PARTS | OF_THE_BATCH
    new = of_masking_utils(r".*_(mask_function|overlay|compatibility_function)") - known
    assert not new, f"translate {new} in modeling.read_mask_function, or see that they are refused, and list them here"
    new = of_masking_utils("create_.*") - CREATORS
    assert not new, f"see what {new} hand to mask functions, and list them here"


@pytest.mark.parametrize("name", TRANSLATED)
def test_a_translated_mask_is_what_the_function_says(name: str) -> None:
    function: Callable[..., Any] = getattr(masking_utils, name)
    arguments = TRANSLATED[name]
    function = function(*arguments) if arguments else function
    kind = read_mask_function(function)
    places = torch.arange(LENGTH)
    zero = torch.zeros((), dtype=torch.int64)
    dense = torch.stack([torch.stack([torch.as_tensor(function(zero, zero, q, k)) for k in places]) for q in places])
    documents = Documents.from_bounds(np.array([0, LENGTH]))
    if kind.chunk_size:
        documents = documents.chunked(kind.chunk_size, LENGTH if kind.chunks_from_row_start else 0)
    low, high = Mask(documents, kind.window_left, kind.window_right).interval(np.arange(LENGTH))
    ours = (places >= torch.from_numpy(low)[:, None]) & (places < torch.from_numpy(high)[:, None])
    assert torch.equal(dense.bool(), ours)


@pytest.mark.parametrize("name", sorted(PARTS))
def test_other_combinations_of_overlays_are_refused(name: str) -> None:
    if not hasattr(masking_utils, name):
        return  # of a later release
    argument = torch.tensor([[0] * LENGTH]) if name == "blockwise_overlay" else 6
    overlay = getattr(masking_utils, name)(*((6, LEFT_PADDING) if name == "chunked_overlay" else (argument,)))
    causal = masking_utils.causal_mask_function
    both = masking_utils.and_masks(overlay, masking_utils.sliding_window_causal_mask_function(5))
    for function in (overlay, masking_utils.or_masks(causal, overlay), both):
        with pytest.raises(hf_usp.UspError, match="a mask made of"):
            read_mask_function(function)


def calls_of_attention(source: str) -> Iterator[ast.Call]:
    """Calls of `attention_interface` in a modeling file."""
    for found in re.finditer(r"\battention_interface\(", source):
        end, depth = found.end(), 1
        while depth:
            depth += {"(": 1, ")": -1}.get(source[end], 0)
            end += 1
        call = ast.parse("f(" + source[found.end() : end], mode="eval").body
        assert isinstance(call, ast.Call)
        yield call


def keywords_of(sources: Iterator[str]) -> set[str]:
    return {k.arg for source in sources for call in calls_of_attention(source) for k in call.keywords if k.arg}


def modeling_files() -> Iterator[str]:
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        yield path.read_text(encoding="utf-8")


def test_no_keyword_reaches_attention_unknown() -> None:
    found = keywords_of(modeling_files())
    assert found >= {"scaling", "dropout", "sliding_window", "softcap", "s_aux"}, "the calls were not found"
    new = found - KEYWORDS - REFUSED - HARMLESS - set(SELECTIONS) - {"attention_mask"}
    assert not new, (
        f"translate {new} in modeling.usp_attention_forward, or see that they are refused, and list them here"
    )


def test_no_documented_keyword_is_unknown() -> None:
    documented = {*TransformersKwargs.__annotations__, *FlashAttentionKwargs.__annotations__}
    assert documented <= KEYWORDS | HARMLESS, "keywords that models pass on to attention"


def test_a_new_keyword_would_be_noticed() -> None:
    source = "x = attention_interface(self, q, k, v, mask, dropout=0.0 if a else f(1), brand_new=self.b, **kwargs)"
    assert keywords_of(iter([source])) == {"dropout", "brand_new"}


@pytest.mark.parametrize("keyword", SELECTIONS)
def test_selections_of_layers_without_an_indexer_are_refused(keyword: str) -> None:
    context = ForwardContext(None)  # type: ignore[arg-type]  # refused before the layout is looked at
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(hf_usp.UspModelError, match=f"Identity selects .*{SELECTIONS[keyword]}"):
        usp_attention_forward(torch.nn.Identity(), x, x, x, None, usp=context, **{keyword: torch.ones(2)})


@pytest.mark.parametrize("keyword", [*sorted(REFUSED), "brand_new"])
def test_keywords_that_are_not_translated_are_refused(keyword: str) -> None:
    context = ForwardContext(None)  # type: ignore[arg-type]  # refused before the layout is looked at
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(hf_usp.UspModelError, match=f"passes `{keyword}` to its attention"):
        usp_attention_forward(torch.nn.Identity(), x, x, x, None, usp=context, **{keyword: torch.ones(2)})
