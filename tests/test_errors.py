"""Refusals say what was found, the rule and the remedy, and can be pickled; here are those that no other test meets."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedConfig

import hf_usp
from hf_usp.callbacks import UspMetricsCallback
from hf_usp.distributed.comm import verify_same_across_ranks
from hf_usp.planner.request import shape_of
from hf_usp.planner.workload import Degrees, ModelShape, TrainingStep, check
from hf_usp.sharding.degrees import choose_ulysses_degree
from hf_usp.sharding.heads import split_heads
from hf_usp.sharding.load_balance import fixed_assignment
from hf_usp.sharding.masks import Documents, Mask
from hf_usp.sharding.schedule import make_ring_schedule
from hf_usp.tools.check import CheckOptions
from hf_usp.tools.check.run import run
from hf_usp.tools.explain import first_batch
from hf_usp.tools.explain.numbers import Case, explain

from .ranks import Ranks

ALL = [getattr(hf_usp, name) for name in hf_usp.__all__ if name.endswith("Error")]


@pytest.mark.parametrize("kind", ALL)
def test_one_form_that_pickles(kind: type[hf_usp.UspError]) -> None:
    error = kind("cp_size=3 in a world of 4.", rule="it divides the world", remedy="choose 1, 2 or 4.")
    assert str(error) == "usp: cp_size=3 in a world of 4. Rule: it divides the world. Remedy: choose 1, 2 or 4."
    error.on_every_rank = True  # type: ignore[attr-defined]
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == str(error) and vars(again) == vars(error)


@pytest.mark.parametrize("parts", [{}, {"rule": "r"}, {"remedy": "r"}])
def test_rule_and_remedy_are_required(parts: dict[str, str]) -> None:
    with pytest.raises(TypeError, match="required keyword-only argument"):
        hf_usp.UspError("found", **parts)


def attend(
    keys: tuple[int, ...] = (1, 8, 2, 4), dtype: torch.dtype = torch.float32, whole: bool = False, **options: Any
) -> None:
    q, k, v = torch.zeros(1, 8, 2, 4), torch.zeros(keys), torch.zeros(1, 8, 2, 4, dtype=dtype)
    if whole:
        q, k, v = q.long(), k.long(), v.long()
    layout = options.pop("layout", sharded({})["usp"])
    hf_usp.usp_attention(options.pop("q", q), k, v, layout, **options)


def sharded(batch: dict[str, Any], **options: Any) -> dict[str, Any]:
    return hf_usp.shard({"input_ids": torch.zeros(1, 8, dtype=torch.long), **batch}, alone(), **options)


def alone() -> hf_usp.UspMesh:
    return hf_usp.UspMesh.build(ring_degree=1, ulysses_degree=1)


SHAPE = ModelShape(layers=2, hidden=8, intermediate=8, heads=2, kv_heads=2, head_dim=4, vocab=8)
# The deed -> what the remedy says.
CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "window": (lambda: attend(sliding_window=0), "sliding_window=1 or more"),
    "widths": (lambda: attend(keys=(1, 8, 2, 6)), "full heads"),
    "dtypes": (lambda: attend(dtype=torch.float64), "k.to(q.dtype)"),
    "sinks": (lambda: attend(sinks=torch.zeros(3)), "all query heads"),
    "mesh of text": (lambda: hf_usp.UspMesh.build(ring_degree="2", ulysses_degree=1), "ring_degree=2, without quotes"),
    "mesh of a fraction": (lambda: hf_usp.UspMesh.build(ring_degree=1, ulysses_degree=1.5), "give ulysses_degree a"),
    "mesh of nothing": (lambda: hf_usp.UspMesh.build(ring_degree=None, ulysses_degree=1), "give ring_degree a"),
    "mesh of no ranks": (lambda: hf_usp.UspMesh.build(ring_degree=0, ulysses_degree=1), "give ring_degree a"),
    "sliding layers": (
        lambda: check(replace(SHAPE, sliding_layers=1), Degrees(), TrainingStep(8)),
        "0 to 2 and a window",
    ),
    "heads of no ranks": (lambda: split_heads(4, 4, 0), "give ulysses_degree a whole number of at least 1"),
    "no ranks": (lambda: choose_ulysses_degree(0, 4, 4), "give cp_size a whole number of at least 1"),
    "no ring": (lambda: fixed_assignment(8, 0, "zigzag"), "ring_degree of 1 or more"),
    "bounds": (lambda: Documents(np.array([1, 4]), np.array([0]), np.array([4])), "Documents.from_bounds"),
    "chunks": (lambda: Documents.from_bounds([0, 4]).chunked(0), "attention_chunk_size"),
    "negative window": (lambda: Mask(Documents.from_bounds([0, 4]), left=-2), "sliding_window to 1 or more"),
    "ring rank": (
        lambda: make_ring_schedule([np.arange(4)], Mask(Documents.from_bounds([0, 4])), 1),
        "a rank from 0 to 0",
    ),
    "config": (lambda: shape_of(PreTrainedConfig()), "num_attention_heads and vocab_size"),
    "peak": (lambda: UspMetricsCallback(None, peak_flops=0), "989e12"),
    "profile step": (lambda: UspMetricsCallback(None, profile_step=0), "profile_step=3"),
    "whole numbers": (lambda: attend(keys=(1, 8, 2, 4), whole=True), "q.to(torch.bfloat16)"),
    "no tensor": (lambda: attend(q=[1.0]), "torch.as_tensor"),
    "no layout": (lambda: attend(layout=None), '["usp"]'),
    "causal as text": (lambda: attend(causal="no"), "pass causal as a bool"),
    "window True": (lambda: attend(sliding_window=True), "as an int"),
    "scaling NaN": (lambda: attend(scaling=float("nan")), "D ** -0.5"),
    "softcap 0": (lambda: attend(softcap=0.0), "None for no softcap"),
    "softcap NaN": (lambda: attend(softcap=float("nan")), "None for no softcap"),
    "kernel on CPU": (lambda: sharded({}, kernel="spiral"), "leave kernel=None"),
    "no items": (lambda: sharded({"num_items_in_batch": 0}), "or leave it out"),
    "items NaN": (lambda: sharded({"num_items_in_batch": torch.tensor(float("nan"))}), "or leave it out"),
    "items as text": (lambda: sharded({"num_items_in_batch": "3"}), "or leave it out"),
    "labels as lists": (lambda: sharded({"labels": [[1] * 8]}), "torch.as_tensor(labels)"),
    "labels without a sign": (lambda: sharded({"labels": torch.zeros(1, 8, dtype=torch.uint8)}), "x.long()"),
    "no edges": (lambda: sharded({"cu_seq_lens_q": torch.zeros(0, dtype=torch.int32)}), "DataCollatorWithFlattening"),
    "many ranks": (lambda: explain(Case(1 << 16, 256, 1, 1)), "hf-usp plan takes any"),
    "axes that Accelerate refuses": (
        lambda: hf_usp.UspParallelismConfig(tp_size=3, dp_replicate_size=2),
        "dp_replicate_size to dp_shard_size",
    ),
    "machine that is none": (lambda: hf_usp.UspParallelismConfig(machine=[]), "hf-usp check"),  # type: ignore[arg-type]
    "check dtype": (lambda: run(CheckOptions(dtype="fp8")), "--dtype bf16"),
    "check timeout": (lambda: run(CheckOptions(timeout=0)), "--timeout"),
    "check soak": (lambda: run(CheckOptions(soak_minutes=-1)), "--soak-minutes 10"),
    "check slow": (lambda: run(CheckOptions(slow=2)), "--slow"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_remedy_says_what_to_change(case: str) -> None:
    refused, remedy = CASES[case]
    with pytest.raises(hf_usp.UspError) as refusal:
        refused()
    assert refusal.value.rule and remedy in refusal.value.remedy, str(refusal.value)


@pytest.mark.parametrize(
    ("content", "remedy"),
    [(None, "--documents"), ("", "Dataset.to_json"), ("{}", "Dataset.to_json"), ('{"input_ids": []}', "leave out")],
)
def test_a_data_set_that_is_none(content: str | None, remedy: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "data.jsonl").write_text(content and content + "\n")
    with pytest.raises(hf_usp.UspConfigError) as refusal:
        first_batch.documents_of(str(tmp_path / "data.jsonl"), None)
    assert remedy in refusal.value.remedy


def test_windows_of_any_width_are_exact() -> None:
    layout = sharded({})["usp"]
    q, k, v = torch.randn(3, 1, 8, 2, 4).unbind()
    for causal in (True, False):
        every = hf_usp.usp_attention(q, k, v, layout, causal=causal)
        for window in (8, 2**63 - 1, 10**30):
            assert torch.equal(hf_usp.usp_attention(q, k, v, layout, causal=causal, sliding_window=window), every)


def test_control_characters_are_harmless() -> None:
    error = hf_usp.UspError("a name \x1b[31m \ud800\n", rule="no \x07", remedy="Größe 文件")
    assert "\\x1b[31m \\ud800\n" in str(error) and "\\x07" in error.rule and error.remedy == "Größe 文件"


def meshes_of_a_broken_environment() -> list[str]:
    """LOCAL_WORLD_SIZE is no number on one rank alone, for a mesh and for a config that chooses its degree."""
    import os

    import torch.distributed as dist
    from accelerate.state import AcceleratorState, PartialState

    from hf_usp.integrations.ulysses_degree import chosen_degree

    from .tiny import tiny_model

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)  # on CPU it reads that variable, too
    kept, found = os.environ.get("LOCAL_WORLD_SIZE"), []
    os.environ["LOCAL_WORLD_SIZE"] = "two" if dist.get_rank() == 1 else "2"
    config, model = hf_usp.UspParallelismConfig(cp_size=2), tiny_model("llama", "usp")
    try:
        for build in (
            lambda: hf_usp.UspMesh.build(ring_degree=1, ulysses_degree=2),
            lambda: chosen_degree(config, model, torch.device("cpu"), 2),
            lambda: verify_same_across_ranks(
                torch.zeros(1), pickled() if dist.get_rank() == 1 else None, dist.group.WORLD
            ),
        ):
            try:
                build()
            except hf_usp.UspError as refusal:
                found.append(str(refusal))
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]
        if kept is not None:
            os.environ["LOCAL_WORLD_SIZE"] = kept
    return found


def pickled() -> hf_usp.UspError:
    return hf_usp.UspModelError("a pickle", rule="no pickles", remedy="leave it out")


def test_a_broken_environment_of_one_rank_is_told_to_all(two_ranks: Ranks) -> None:
    first, second = two_ranks.run(meshes_of_a_broken_environment)
    broken = "LOCAL_WORLD_SIZE='two' in the environment. Rule: it is a whole number of at least 1. Remedy: unset"
    assert broken in second[0] and "another rank" not in second[0]
    assert f"another rank of this context-parallel group refused (rank 1: UspConfigError: usp: {broken}" in first[0]
    assert first[1] == second[1] and first[1].startswith(f"usp: rank 1: {broken}")
    assert second[2] == str(pickled()) and f"rank 1: UspModelError: {pickled()}" in first[2]
    for text in (first[0], first[2]):
        assert text.endswith("Remedy: follow the remedy in that rank's message; this rank itself found nothing wrong.")


@pytest.mark.parametrize("ending", ["html", "png"])
def test_what_cannot_be_saved_in_the_end_is_refused(tmp_path: Path, ending: str) -> None:
    """A full disk: the file can be opened."""
    from hf_usp.tools.explain.page import write_page
    from hf_usp.tools.explain.plot import draw

    full = tmp_path / f"full.{ending}"
    full.symlink_to("/dev/full")
    with pytest.raises(hf_usp.UspConfigError, match=r"to be saved as .*No space left.*--output"):
        (write_page if ending == "html" else draw)(explain(Case(tokens=16, ranks=2, heads=2, kv_heads=2)), str(full))
