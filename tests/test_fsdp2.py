"""FSDP2 around the mesh: parameters sharded over dp_shard x cp, the same losses and weights as one process.

The device is the CPU, the backend gloo, and `fully_shard` is the real one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from .cpu_accelerator import cpu_as_accelerator
from .ranks import Ranks
from .tiny import HYBRID, rows, tiny_model


def train(sizes: dict[str, int] | None, family: str = "qwen2", changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Four AdamW steps on batches of four rows; FSDP2 where `sizes` are given, else one process."""
    model = tiny_model(family, "usp" if sizes else "eager", tie_word_embeddings=False, **changes or {})
    if sizes is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
        return _steps(model, optimizer, [rows(4, 33) for _ in range(4)], lambda loss: loss.backward())
    with cpu_as_accelerator():
        from accelerate import Accelerator, FullyShardedDataParallelPlugin

        import hf_usp

        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[type(model.model.layers[0]).__name__],
        )
        config = hf_usp.UspParallelismConfig(**sizes)
        accelerator = Accelerator(fsdp_plugin=plugin, parallelism_config=config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        data_parallel = config.dp_shard_size * config.dp_replicate_size
        per_rank = 4 // data_parallel
        mine = (dist.get_rank() // config.cp_size) * per_rank
        batches = [rows(4, 33)[mine : mine + per_rank] for _ in range(4)]
        result = _steps(prepared, optimizer, batches, accelerator.backward)
        result["sharded"] = all(type(p).__name__ == "DTensor" for p in prepared.parameters())
        result["weights"] = {k: v.full_tensor() for k, v in prepared.state_dict().items()}
        return result


def _steps(model: Any, optimizer: Any, batches: Any, backward: Any) -> dict[str, Any]:
    losses, norms = [], []
    world = dist.get_world_size() if dist.is_initialized() else 1
    for batch in batches:
        tensors = {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}
        # Every row has another number of labels: a loss that is a mean over ranks needs the common count.
        everything = torch.tensor([row["labels"] for row in rows(4, 33)])
        items = (everything[:, 1:] != -100).sum()
        # What the Trainer does: a loss over the tokens of all processes counts once per process.
        loss = model(**tensors, num_items_in_batch=items, use_cache=False).loss * world
        backward(loss)
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
    {"cp_size": 2, "ulysses_degree": 1, "dp_shard_size": 2, "loss_chunk": 5, "mlp_chunk": 7},
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_fsdp2_equals_one_process(four_ranks: Ranks, sizes: dict[str, int]) -> None:
    compare(four_ranks.run(train, sizes), train(None))


def test_fsdp2_with_recurrent_layers(four_ranks: Ranks) -> None:
    model = "qwen3_5_text", HYBRID
    compare(four_ranks.run(train, {"cp_size": 4, "ulysses_degree": 2}, *model), train(None, *model))


def compare(results: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    for mine in results:
        assert mine["sharded"]
        assert mine["norms"] == pytest.approx(reference["norms"], rel=1e-4)
        for name, weight in reference["weights"].items():
            torch.testing.assert_close(mine["weights"][name], weight, atol=1e-5, rtol=0)
    # Each data-parallel rank reports its part of the loss, times the number of processes.
    mean = [sum(values) / len(values) for values in zip(*(mine["losses"] for mine in results), strict=True)]
    assert mean == pytest.approx(reference["losses"], abs=1e-5)
