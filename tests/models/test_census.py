"""Every causal LM of Transformers is exact or refused, in four forms of batches, and docs/models.md says which."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..ranks import Ranks
from .census import causal_lm_types, layer_kinds, subjects, tiny_config, tiny_model
from .listed import LISTED
from .table import PATH, cells, read, versions, written_with
from .verdict import CASES, EXACT, REFUSED, UNBUILT, WRONG, Step, Verdict, judge, judge_here, step, step_of_documents

TABLE = PATH.read_text()
ROWS = {name: verdict for name, verdict in read(TABLE).items() if name != "architecture"}
SAME_VERSIONS = written_with(TABLE) == versions()


@pytest.mark.parametrize("subject", subjects())
def test_exact_or_refused(four_ranks: Ranks, subject: str) -> None:
    verdict = judge(four_ranks, subject)
    if subject in LISTED:
        outcome, reason = LISTED[subject]
        assert set(verdict.forms.values()) == {outcome}, f"listed as {outcome} ({reason}), now {verdict}"
    else:
        assert set(verdict.forms.values()) <= {EXACT, REFUSED}, verdict
    if SAME_VERSIONS:
        assert ROWS[subject] == cells(verdict), "docs/models.md is old: run python -m tests.models.write_table"


def test_the_table_has_a_row_for_each() -> None:
    assert not SAME_VERSIONS or sorted(ROWS) == subjects()
    assert len(ROWS) > 150 and "exact" in ROWS["llama"]


# A family, what of it is left as it is, and the forms that are refused all the same.
BROKEN = {
    "minimax": ("hf_usp.models.lightning_attention.is_lightning_attention", lambda module: False, {"left"}),
    "bart": ("hf_usp.models.positions.PlaceEmbeddings._number", lambda *args: None, {"left", "packed"}),
}


def judge_broken(model_type: str) -> Verdict:
    name, replacement, _ = BROKEN[model_type]
    with patch(name, replacement):
        return judge_here(model_type, False)


@pytest.mark.parametrize("model_type", BROKEN)
def test_the_census_sees_what_is_silently_wrong(four_ranks: Ranks, model_type: str) -> None:
    """With the self-check's verdict off little stops a model whose layers look past the shard's edge.

    Rows padded on the left are refused: a measurement, which is not switched off, cannot tell them right.
    """
    found: dict[str, str] = {}
    for verdict in four_ranks.run(judge_broken, model_type, timeout=60):
        found |= verdict.forms
    assert found == {form: REFUSED if form in BROKEN[model_type][2] else WRONG for form in CASES}, found


def test_one_wrong_gradient_is_an_error() -> None:
    right = Step(torch.tensor(2.0), torch.ones(5, 7), [torch.ones(3, 3), 1e-2 * torch.ones(4)])
    wrong = Step(right.loss, right.logits, [right.gradients[0], right.gradients[1] * 1.001])
    assert right.largest_error(right) == 0.0
    assert 5e-4 < right.largest_error(wrong) < 1e-3
    wrong.gradients[0] = torch.full((3, 3), float("nan"))
    assert right.largest_error(wrong) == float("inf")


@pytest.mark.parametrize("model_type", [t for t in causal_lm_types() if LISTED.get(t, ("", ""))[0] != UNBUILT])
def test_tiny_models_have_every_kind_of_layer(model_type: str) -> None:
    """All kinds of the family's default configuration are in the tiny one."""
    assert set(layer_kinds(CONFIG_MAPPING[model_type]())) <= set(layer_kinds(tiny_config(model_type)))


def test_the_reference_of_packed_documents_sees_one_document_at_a_time() -> None:
    """In one process BERT's packed documents see each other: as a reference that would be something else."""
    model = tiny_model("bert", "eager").eval()
    alone = step_of_documents(model)
    assert alone.largest_error(step(model, "flattened")) > 1e-2
    model = tiny_model("llama", "eager").eval()
    assert step_of_documents(model).largest_error(step(model, "flattened")) < 1e-5
