"""FSDP2 around the mesh: parameters sharded over dp_shard x cp, the same losses and weights as one process.

The device is the CPU, the backend gloo, and `fully_shard` is the real one.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import hf_usp
from hf_usp.memory.tiled_layer import tiled_layer

from ..ranks import Ranks
from ..tiny import HYBRID, INDEXED, rows, tiny_model
from .cpu_accelerator import cpu_as_accelerator, fsdp2


def train(
    sizes: dict[str, Any] | None, family: str = "qwen2", changes: dict[str, Any] | None = None, **plugin: Any
) -> dict[str, Any]:
    """Four AdamW steps on batches of four rows; FSDP2 where `sizes` are given, else one process."""
    model = tiny_model(family, "usp" if sizes else "eager", tie_word_embeddings=False, **changes or {})
    if sizes is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
        return _steps(model, optimizer, [rows(4, 33) for _ in range(4)])
    with cpu_as_accelerator():
        accelerator = fsdp2(model, sizes, **plugin)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        result = _steps(prepared, optimizer, share_of_rows(accelerator), accelerator)
        if "layer_chunk_size" in sizes:
            tiled = [layer for layer in map(tiled_layer, prepared.modules()) if layer is not None]
            assert [set(layer.verdicts.values()) for layer in tiled] == [{None}] * 2
        result["sharded"] = all(type(p).__name__ == "DTensor" for p in prepared.parameters())
        state = prepared.state_dict()
        result["weights"] = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}
        return result


def share_of_rows(accelerator: Any, steps: int = 4) -> list[list[dict[str, Any]]]:
    """The rows of this data-parallel rank, for each step."""
    per_rank = 4 // accelerator.num_processes
    mine = (dist.get_rank() * accelerator.num_processes // dist.get_world_size()) * per_rank
    return [rows(4, 33)[mine : mine + per_rank] for _ in range(steps)]


@cache
def one_process(family: str = "qwen2", changes: tuple[tuple[str, Any], ...] = ()) -> dict[str, Any]:
    """`train` without a mesh, the reference of all sizes, computed once."""
    return train(None, family, dict(changes))


def _steps(model: Any, optimizer: Any, batches: Any, accelerator: Any = None) -> dict[str, Any]:
    losses, norms = [], []
    for batch in batches:
        tensors = {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}
        # Every row has another number of labels: a loss that is a mean over ranks needs the common count.
        everything = torch.tensor([row["labels"] for row in rows(4, 33)])
        items = (everything[:, 1:] != -100).sum()
        # As the Trainer does: a loss over the tokens of all processes counts once for each of `num_processes`.
        loss = model(**tensors, num_items_in_batch=items, use_cache=False).loss
        loss = loss * (1 if accelerator is None else accelerator.num_processes)
        (torch.Tensor.backward if accelerator is None else accelerator.backward)(loss)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        norms.append((norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "weights": dict(model.state_dict())}


SIZES = [
    {"cp_size": 4, "ulysses_degree": 2},
    {"cp_size": 2, "ulysses_degree": 2, "dp_shard_size": 2},
    {"cp_size": 2, "ulysses_degree": 1, "dp_replicate_size": 2},
    {"cp_size": 2, "ulysses_degree": 1, "dp_shard_size": 2, "loss_chunk_size": 5, "mlp_chunk_size": 7},
    {"cp_size": 4, "ulysses_degree": 2, "layer_chunk_size": 4, "head_groups": 2, "keep_attention": 1},
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_fsdp2_equals_one_process(four_ranks: Ranks, sizes: dict[str, int]) -> None:
    compare(four_ranks.run(train, sizes), one_process())


def test_fsdp2_with_recurrent_layers(four_ranks: Ranks) -> None:
    model = "qwen3_5_text", HYBRID
    compare(
        four_ranks.run(train, {"cp_size": 4, "ulysses_degree": 2}, *model), one_process(model[0], tuple(HYBRID.items()))
    )


@pytest.mark.parametrize("family", INDEXED)
def test_fsdp2_with_queries_that_select_their_keys(four_ranks: Ranks, family: str) -> None:
    found = four_ranks.run(train, {"cp_size": 4, "ulysses_degree": 2}, family, INDEXED[family])
    compare(found, train(None, family, INDEXED[family]))


@pytest.mark.parametrize("plugin", [{"offload": True}, {"activation_checkpointing": True}], ids=str)
def test_what_the_plugin_adds(four_ranks: Ranks, plugin: dict[str, Any]) -> None:
    """Parameters offloaded to the CPU; layers that are computed again in the backward; with the loss in chunks."""
    sizes = {"cp_size": 2, "ulysses_degree": 2, "dp_replicate_size": 2, "loss_chunk_size": 7}
    compare(four_ranks.run(train, sizes, **plugin), one_process())


def in_bf16(sizes: dict[str, Any]) -> dict[str, Any]:
    result = train(sizes, precision="bf16")
    assert {w.dtype for w in result["weights"].values()} == {torch.float32}
    return result


@pytest.mark.parametrize("chunk", [None, 5])
def test_bf16(four_ranks: Ranks, chunk: int | None) -> None:
    """Weights in fp32, everything computed and reduced in bf16: a factor of the mesh would show in the norms."""
    reference = one_process()
    for mine in four_ranks.run(in_bf16, {"cp_size": 4, "ulysses_degree": 2, "loss_chunk_size": chunk}):
        assert mine["losses"] == pytest.approx(reference["losses"], abs=2e-2)
        assert mine["norms"] == pytest.approx(reference["norms"], rel=2e-2)


def counted_in_bf16() -> dict[str, Any]:
    """Losses of a hand-written loop with the count as `shard` gives it, as a number, and as FSDP2 would cast it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model, mesh = tiny_model("qwen2", "usp"), init_device_mesh("cpu", (4,))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    ids = torch.arange(603)[None] % 61 + 3
    share = hf_usp.shard({"input_ids": ids, "labels": ids}, hf_usp.UspMesh.build(ring_degree=2, ulysses_degree=2))
    count = share.pop("num_items_in_batch")
    plain = count.as_subclass(torch.Tensor)
    given = {"shard": count, "moved": count.to("cpu"), "half": count.half(), "number": count.item(), "cast": plain}
    with torch.no_grad():
        losses = {name: model(**share, num_items_in_batch=n).loss for name, n in given.items()}
    assert type(losses["shard"]) is torch.Tensor
    with cpu_as_accelerator():
        model = tiny_model("qwen2", "usp")
        prepared, _ = fsdp2(model, {"cp_size": 4}, "bf16").prepare(model, torch.optim.SGD(model.parameters()))
        with pytest.raises(hf_usp.UspError) as error:
            prepared(input_ids=ids, labels=ids, num_items_in_batch=count.as_subclass(torch.Tensor))
    return {name: loss.item() for name, loss in losses.items()} | {"count": count.item(), "message": str(error.value)}


def test_counts_are_not_rounded(four_ranks: Ranks) -> None:
    """150.5 tokens a rank, which bf16 does not know: kept in a hand-written loop, refused where it has been cast."""
    for mine in four_ranks.run(counted_in_bf16):
        assert mine["count"] == 150.5
        assert mine["shard"] == mine["number"] == mine["moved"] == mine["half"]
        assert abs(mine["cast"] / mine["number"] - 1) > 2e-3
        assert "num_items_in_batch in torch.bfloat16" in mine["message"]


def save(folder: str, sizes: dict[str, Any], kind: str) -> None:
    """Two steps, then everything of Accelerate's state and the whole weights."""
    with cpu_as_accelerator():
        model = tiny_model("qwen2", "usp", tie_word_embeddings=False)
        accelerator = fsdp2(model, sizes, state_dict_type=kind)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.003))
        _steps(model, optimizer, share_of_rows(accelerator, 2), accelerator)
        accelerator.save_state(f"{folder}/state")
        accelerator.save_model(model, f"{folder}/whole")


def go_on(folder: str, sizes: dict[str, Any], kind: str) -> dict[str, Any]:
    """Two more steps from a saved state, on this mesh."""
    with cpu_as_accelerator():
        model = tiny_model("qwen2", "usp", tie_word_embeddings=False)
        with torch.no_grad():
            model.lm_head.weight.zero_()  # what is not loaded would show
        accelerator = fsdp2(model, sizes, state_dict_type=kind)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.003))
        accelerator.load_state(f"{folder}/state")
        result = _steps(model, optimizer, share_of_rows(accelerator, 2), accelerator)
        result["sharded"] = all(type(p).__name__ == "DTensor" for p in model.parameters())
        result["weights"] = {k: v.full_tensor() for k, v in model.state_dict().items()}
        return result


@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_saved_on_one_mesh_and_continued_on_another(four_ranks: Ranks, tmp_path: Path, kind: str) -> None:
    from safetensors.torch import load_file

    four_ranks.run(save, str(tmp_path), {"cp_size": 4, "ulysses_degree": 2}, kind)
    reference = one_process()
    last = {name: values[2:] if name != "weights" else values for name, values in reference.items()}
    other = {"cp_size": 2, "ulysses_degree": 1, "dp_shard_size": 2}
    compare(four_ranks.run(go_on, str(tmp_path), other, kind), last)
    compare(four_ranks.run(go_on, str(tmp_path), {"cp_size": 4, "ulysses_degree": 2}, kind), last)
    # The whole weights are those of one process after two steps: its third loss comes from them.
    model = tiny_model("qwen2", "eager", tie_word_embeddings=False)
    model.load_state_dict(load_file(tmp_path / "whole" / "model.safetensors"))
    result = _steps(model, torch.optim.AdamW(model.parameters()), [rows(4, 33)])
    assert result["losses"] == pytest.approx(reference["losses"][2:3], abs=1e-5)


def compare(results: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    for mine in results:
        assert mine["sharded"]
        assert mine["norms"] == pytest.approx(reference["norms"], rel=1e-4)
        for name, weight in reference["weights"].items():
            torch.testing.assert_close(mine["weights"][name], weight, atol=1e-5, rtol=0)
    # Each data-parallel rank reports its part of the loss, times the number of processes.
    mean = [sum(values) / len(values) for values in zip(*(mine["losses"] for mine in results), strict=True)]
    assert mean == pytest.approx(reference["losses"], abs=1e-5)
