"""How often a micro-batch makes the host wait for the device: counted by calls that read a value, on any device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_usp

from ..harness import prepare
from ..ranks import Ranks
from ..tiny import batch_of, tiny_model


def waits(form: str, layers: int, counted: bool) -> dict[str, int]:
    """Place -> waits of the third of three steps; the first has the self-check."""
    from gpu_host import HostWaits

    model = prepare(tiny_model(num_hidden_layers=layers).train(), ring=2, ulysses=1)
    batch: dict[str, Any] = batch_of(form)
    if counted:
        batch["num_items_in_batch"] = torch.tensor(20)
    for _ in range(2):
        model(**batch).loss.backward()
    with HostWaits() as seen:
        model(**batch).loss.backward()
    return dict(seen.found)


@pytest.mark.parametrize("form", ["plain", "right", "packed"])
def test_waits_do_not_grow_with_the_layers(two_ranks: Ranks, form: str) -> None:
    """One copy brings what tells the documents and the agreement of the ranks."""
    for layers in (2, 5):
        for found in two_ranks.run(waits, form, layers, False):
            assert found == {"utils/upload.py": 1}, (form, layers)


def test_a_count_in_a_tensor_is_one_more(two_ranks: Ranks) -> None:
    for found in two_ranks.run(waits, "plain", 2, True):
        assert found == {"utils/upload.py": 1, "batch/validation.py": 1}


def test_one_more_is_seen() -> None:
    from gpu_host import HostWaits

    with HostWaits() as seen:
        hf_usp.batch.documents.find_documents(1, 4, torch.ones(1, 4), None)
        torch.ones(()).item()
    assert dict(seen.found) == {"utils/upload.py": 1}
