"""Modules that look a few tokens back run on runs of tokens, each after the tokens before it."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

from hf_usp.models import look_back
from hf_usp.models.look_back import LookBackLayers, OnPieces, runs_on_pieces

from ..ranks import Ranks
from .census import tiny_model
from .verdict import REFUSED, WRONG, judge_here


def judged_with_reach(kind: str, less: int) -> dict[str, str]:
    """The verdicts where the halo is too short by so many tokens, without the self-check's verdict."""
    honest = look_back.reach_of
    with patch.object(look_back, "reach_of", lambda module: max(honest(module) - less, 0)):
        return judge_here(kind, False).forms


@pytest.mark.parametrize("kind", ["zaya", "qwen4_exp_text"])
def test_a_halo_of_one_token_less_is_wrong(four_ranks: Ranks, kind: str) -> None:
    found: dict[str, str] = {}
    for forms in four_ranks.run(judged_with_reach, kind, 1, timeout=60):
        found |= forms
    assert found["plain"] == WRONG, found
    assert set(found.values()) <= {WRONG, REFUSED}, found


def test_modules_are_put_back() -> None:
    model: Any = tiny_model("zaya", "usp")
    layers = LookBackLayers(model)
    projection = model.model.layers[0].self_attn.qkv_proj
    assert runs_on_pieces(projection) and isinstance(projection.forward.__func__, OnPieces)
    layers.release()
    assert not runs_on_pieces(projection) and "forward" not in projection.__dict__
