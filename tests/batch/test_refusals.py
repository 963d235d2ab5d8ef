"""Every refusal comes before anything is computed, names value, rule and remedy, and reaches every rank."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist

import hf_usp

from ..harness import prepared
from ..ranks import Ranks
from ..tiny import HYBRID, batch_of, rows, tiny_model

# A rotary embedding that looks at the largest position.
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


def refusal(case: str) -> str:
    """The message that this rank gets for a bad call; the ranks meet afterwards, so none is left waiting."""
    try:
        CASES[case](dist.get_rank())
        message = "nothing was refused"
    except hf_usp.UspError as error:
        message = str(error)
    dist.barrier()
    return message


def other_batch(rank: int) -> None:
    batch = batch_of("plain")
    if rank == 2:
        batch["input_ids"][0, 3] += 1
    prepared()(**batch)


def bad_on_one_rank(rank: int) -> None:
    batch = batch_of("plain")
    if rank == 1:
        batch["labels"] = batch["labels"][:, :-1]
    prepared()(**batch)


def other_shape(rank: int) -> None:
    prepared()(**batch_of("plain", length=37 + (rank == 3)))


def broken_on_one_rank(rank: int) -> None:
    """Not one of our refusals: any exception while cutting must reach the others."""
    batch: dict[str, Any] = batch_of("packed")
    if rank == 0:
        batch["position_ids"] = batch["position_ids"].to(torch.complex64)
    try:
        prepared()(**batch)
    except hf_usp.UspError:
        raise
    except Exception as error:
        raise hf_usp.UspError(f"this rank: {type(error).__name__}", rule="rule", remedy="remedy") from error


def changed(**changes: Any) -> Any:
    def case(rank: int) -> None:
        batch: dict[str, Any] = batch_of("plain")
        batch.update({k: v(batch) if callable(v) else v for k, v in changes.items()})
        prepared()(**{k: v for k, v in batch.items() if v is not None})

    return case


def holes(batch: dict[str, Any]) -> torch.Tensor:
    mask = torch.ones_like(batch["input_ids"])
    mask[1, 4:6] = 0
    return mask


def noisy(rank: int) -> None:
    """As NEFTune marks a model."""
    model = prepared().train()
    hf_usp.models.find.find_model(model).get_input_embeddings().neftune_noise_alpha = 5.0
    model(**batch_of("plain"))


CASES: dict[str, Any] = {
    "differing tokens": other_batch,
    "differing shapes": other_shape,
    "bad on one rank": bad_on_one_rank,
    "exception on one rank": broken_on_one_rank,
    "4D mask": changed(attention_mask=lambda b: torch.ones(2, 1, 37, 37)),
    "mask with holes": changed(attention_mask=holes),
    "output_attentions": changed(output_attentions=True),
    "labels of another length": changed(labels=lambda b: b["labels"][:, :-2]),
    "empty batch": changed(input_ids=lambda b: b["input_ids"][:0], labels=lambda b: b["labels"][:0]),
    "no tokens": changed(input_ids=None),
    "unknown tensor": changed(pixel_values=torch.zeros(2, 3)),
    "tuples": changed(return_dict=False),
    "cache with labels": changed(past_key_values=lambda b: object()),
    "cu_seq_lens": changed(cu_seq_lens_q=torch.tensor([0, 10])),
    "documents and padding": changed(
        attention_mask=lambda b: torch.ones_like(b["input_ids"]), cu_seq_lens_q=torch.tensor([0, 10, 74])
    ),
    "attention dropout": lambda rank: prepared(attention_dropout=0.1).train()(**batch_of("plain")),
    "NEFTune": noisy,
    "own attention code": lambda rank: prepared("bloom", hidden_size=32, n_head=4)(**batch_of("plain")),
    "not usp": lambda rank: prepared(attention="sdpa"),
    "compiled": lambda rank: prepared(compiled="user", rope_parameters=DYNAMIC),
    "compiled by Accelerate": lambda rank: prepared(compiled="accelerate", rope_parameters=DYNAMIC),
    "compiled, recurrent layers": lambda rank: prepared("qwen3_5_text", compiled="accelerate", **HYBRID),
    "compiled, another head": lambda rank: prepared(compiled="head"),
    "not a model": lambda rank: hf_usp.models.find.find_model(torch.nn.Linear(2, 2)),
    "world": lambda rank: hf_usp.UspMesh.build(ring_degree=3, ulysses_degree=1),
    "unknown kernel": lambda rank: attend(kernel="flash_attn_9"),
    "kernel not installed": lambda rank: attend(kernel="flash_attn"),
    "unknown order": lambda rank: attend(order="spiral"),
    "shape of a share": lambda rank: attend(wrong=True),
    "unshard of a full tensor": lambda rank: unshard_full(),
}


def attend(order: str = "auto", kernel: str | None = None, wrong: bool = False) -> None:
    mesh = hf_usp.UspMesh.build(ring_degree=2, ulysses_degree=2)
    layout = hf_usp.shard({"input_ids": torch.zeros(1, 8, dtype=torch.long)}, mesh, order=order, kernel=kernel)["usp"]
    q = torch.randn(1, 8 if wrong else 2, 4, 16)
    hf_usp.usp_attention(q, q, q, layout)


def unshard_full() -> None:
    mesh = hf_usp.UspMesh.build(ring_degree=2, ulysses_degree=2)
    layout = hf_usp.shard({"input_ids": torch.zeros(1, 8, dtype=torch.long)}, mesh)["usp"]
    hf_usp.unshard(torch.zeros(1, 8), layout)


@pytest.mark.parametrize("case", CASES)
def test_refused_on_every_rank(four_ranks: Ranks, case: str) -> None:
    messages = four_ranks.run(refusal, case, timeout=60)
    for message in messages:
        assert message.startswith("usp: "), message
        assert "nothing was refused" not in message
    assert any("Rule: " in message for message in messages), messages


def test_the_rank_with_another_batch_is_named(four_ranks: Ranks) -> None:
    assert all("rank(s) 2" in message for message in four_ranks.run(refusal, "differing tokens"))
    elsewhere = four_ranks.run(refusal, "bad on one rank")
    assert "labels of shape (2, 36)" in elsewhere[1]
    assert all("rank 1: UspBatchError" in message for r, message in enumerate(elsewhere) if r != 1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"cp_size": 8, "ulysses_degree": 3},
        {"cp_size": 0},
        {"cp_size": 4, "ulysses_degree": 0},
        {"cp_size": 4, "sequence_order": "spiral"},
        {"cp_size": 2, "sp_size": 2},
        {"cp_size": True},
        {"cp_size": "2"},
        {"ulysses_degree": 2.0},
        {"ulysses_degree": "2"},
        {"dp_shard_size": "2"},
        {"tp_size": 0},
        {"kernel": "flash_atn"},
        {"kernel": 3},
        {"kernel": ["eager"]},
        {"loss_chunk_size": True},
        {"mlp_chunk_size": 0.5},
        {"ranks_per_node": "8"},
        {"sequence_length": -1},
        {"machine": 3},
        {"machine": "h100"},
        {"gather_outputs": "no"},
        {"offload_checkpoints": 1},
        {"self_check": None},
    ],
    ids=str,
)
def test_sizes_and_options_that_do_not_fit(arguments: dict[str, Any]) -> None:
    """At construction, not at the first forward."""
    with pytest.raises(hf_usp.UspConfigError, match=r"Rule: .* Remedy: ") as refusal:
        hf_usp.UspParallelismConfig(**{"cp_size": 2} | arguments)
    name, value = list(arguments.items())[-1]
    assert name in str(refusal.value) or name.split("_")[0] in str(refusal.value)
    assert repr(value).strip("'\"") in str(refusal.value)


@pytest.mark.parametrize("axis", ["CP", "DP_SHARD", "TP"])
def test_sizes_of_the_environment(monkeypatch: pytest.MonkeyPatch, axis: str) -> None:
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{axis}_SIZE", "2")
    assert getattr(hf_usp.UspParallelismConfig(), f"{axis.lower()}_size") == 2
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{axis}_SIZE", "two")
    with pytest.raises(hf_usp.UspConfigError, match=rf"PARALLELISM_CONFIG_{axis}_SIZE='two'.*Rule: .*Remedy: "):
        hf_usp.UspParallelismConfig()


def test_more_ranks_than_processes() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(hf_usp.UspConfigError, match="start 4 processes"):
        Accelerator(cpu=True, parallelism_config=hf_usp.UspParallelismConfig(cp_size=4, ulysses_degree=2))


def test_a_mesh_needs_a_process_group() -> None:
    with pytest.raises(hf_usp.UspConfigError, match="torchrun or accelerate launch"):
        hf_usp.UspMesh.build(ring_degree=2, ulysses_degree=1)


def short_sequence(length: int) -> tuple[float, float]:
    reference, model = tiny_model("llama", "eager"), prepared()
    batch = {k: torch.tensor([v]) for k, v in rows(1, length, ignored=False)[0].items()}
    return model(**batch).loss.item(), reference(**batch).loss.item()


@pytest.mark.parametrize("length", [2, 3, 5])
def test_sequences_shorter_than_the_mesh_work(four_ranks: Ranks, length: int) -> None:
    for mine, expected in four_ranks.run(short_sequence, length):
        assert mine == pytest.approx(expected, abs=1e-5)


def test_old_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_usp import compat as versions

    monkeypatch.setattr(versions, "version", lambda package: "2.10.0" if package == "torch" else "99.0")
    with pytest.raises(hf_usp.UspConfigError, match=r"torch 2\.10\.0.*pip install 'torch>=2\.11'"):
        versions.check_versions()


def test_masks_that_are_no_interval_are_refused_by_name() -> None:
    from transformers.masking_utils import blockwise_overlay, causal_mask_function, or_masks

    from hf_usp.models.mask_interface import read_mask_function

    with pytest.raises(hf_usp.UspMaskError, match="or_mask"):
        read_mask_function(or_masks(causal_mask_function, blockwise_overlay(torch.zeros(1, 4))))
    with pytest.raises(hf_usp.UspMaskError, match="my_own"):

        def my_own(b: int, h: int, q: int, k: int) -> bool:
            return True

        read_mask_function(my_own)


def test_a_layer_that_computes_with_its_mask_is_told() -> None:
    from hf_usp.batch.layout import CAUSAL
    from hf_usp.batch.sharded_tensors import ShardedMask

    mask = ShardedMask(dataclasses.replace, CAUSAL)  # type: ignore[arg-type]
    with pytest.raises(hf_usp.UspMaskError, match="`shape`"):
        _ = mask.shape
