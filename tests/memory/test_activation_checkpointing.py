"""Activation checkpointing that keeps attention: messages and kernel calls are those of no checkpointing at all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from trl.models import enable_selective_activation_checkpointing

import hf_usp
from hf_usp.kernels.cpu_flash import CpuFlashKernel
from hf_usp.memory.activation_offload import CHECKPOINTING

from ..harness import checkpointing, compare, fresh_accelerate, training_arguments
from ..ranks import Ranks
from ..tiny import HYBRID, batch_of, largest_difference, rows, tiny_model


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """All-to-alls, key-value messages sent, and kernel calls of this process."""
    seen: Counter[str] = Counter()
    places: list[tuple[Any, str, str]] = [
        (dist, "all_to_all_single", "all-to-alls"),
        (dist, "batch_isend_irecv", "messages"),
        (CpuFlashKernel, "forward", "forwards"),
        (CpuFlashKernel, "backward", "backwards"),
    ]
    stock = [getattr(owner, name) for owner, name, _ in places]

    def counted(function: Any, label: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen[label] += sum(op.op is dist.isend for op in args[0]) if label == "messages" else 1
            return function(*args, **kwargs)

        return call

    for (owner, name, label), function in zip(places, stock, strict=True):
        setattr(owner, name, counted(function, label))
    try:
        yield seen
    finally:
        for (owner, name, _), function in zip(places, stock, strict=True):
            setattr(owner, name, function)


WAYS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "reentrant": {"use_reentrant": True},
    "plain": {"use_reentrant": False},
    "keep": hf_usp.save_attention_outputs(),
    "selective": {},  # TRL's policy, which knows attention by the names of operators
}


def step(family: str, changes: dict[str, Any], degrees: tuple[int, int], way: str) -> tuple[Counter[str], Any]:
    """Counts of one forward and backward of this rank's share, and the gradients summed over ranks."""
    mesh = hf_usp.UspMesh.build(ring_degree=degrees[0], ulysses_degree=degrees[1])
    model = tiny_model(family, **changes).train()
    recurrent = hf_usp.shard_recurrent_layers(model) if changes == HYBRID else None
    if way == "selective":
        enable_selective_activation_checkpointing(model)
        model.gradient_checkpointing_enable()
    elif WAYS[way] is not None:
        checkpointing(model, WAYS[way])
    share = hf_usp.shard(batch_of("packed"), mesh, order="zigzag")
    with counting() as seen:
        model(**share, use_cache=False).loss.backward()
    if recurrent is not None:
        recurrent.release()
    gradients = {}
    for name, p in model.named_parameters():
        gradients[name] = p.grad.clone()
        dist.all_reduce(gradients[name])
    return seen, gradients


@pytest.mark.parametrize("degrees", [(4, 1), (2, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("family, changes", [("qwen2", {}), ("gpt_oss", {"head_dim": 16})], ids=["qwen2", "gpt_oss"])
def test_recomputation_neither_attends_nor_exchanges(
    four_ranks: Ranks, family: str, changes: dict[str, Any], degrees: tuple[int, int]
) -> None:
    by_way = {way: four_ranks.run(step, family, changes, degrees, way) for way in WAYS}
    total = {way: sum((seen for seen, _ in ranks), Counter()) for way, ranks in by_way.items()}
    for rank in range(4):
        none, gradients = by_way["none"][rank]
        assert none["forwards"] and none["backwards"]
        assert by_way["keep"][rank][0] == none == by_way["selective"][rank][0]
        for way in WAYS:
            assert by_way[way][rank][0]["backwards"] == none["backwards"]
            assert largest_difference(by_way[way][rank][1], gradients) < 1e-6
    for way in ("plain", "reentrant"):  # what the policy saves
        assert total[way]["forwards"] == 2 * total["none"]["forwards"]
        assert total[way]["all-to-alls"] == 1.5 * total["none"]["all-to-alls"]
        assert total[way]["messages"] > total["none"]["messages"] or degrees[0] == 1


def test_recurrent_layers_do_not_exchange_again(four_ranks: Ranks) -> None:
    ways = "none", "plain", "keep", "selective"
    by_way = [four_ranks.run(step, "qwen3_5_text", HYBRID, (2, 2), way) for way in ways]
    for (none, gradients), (plain, _), (keep, kept), (selective, others) in zip(*by_way, strict=True):
        assert keep == none and plain["all-to-alls"] > selective["all-to-alls"] > none["all-to-alls"]
        assert largest_difference(kept, gradients) < 1e-6
        assert selective["forwards"] == none["forwards"] and largest_difference(others, gradients) < 1e-6


# Options of checkpointing under the stock Trainer. Where what attention needs is kept, messages and kernel calls of a
# step are those of none, whichever layers are checkpointed and wherever Transformers keeps their inputs.
OPTIONS: dict[str, dict[str, Any]] = {
    "all layers": {},
    "every second layer": {"every_n_layers": 2},
    "inputs on the host": {"offload": True},
}


def train(folder: str, cp_size: int, options: dict[str, Any] | None) -> dict[str, Any]:
    """Three steps of the stock Trainer."""
    from transformers import Trainer

    fresh_accelerate()
    config = hf_usp.UspParallelismConfig(cp_size=cp_size, ulysses_degree=2) if cp_size > 1 else None
    checkpoint = {}
    if options is not None:
        checkpoint = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {**hf_usp.save_attention_outputs(), **options}}
    args = training_arguments(
        folder,
        max_steps=3,
        learning_rate=0.05,
        optim="sgd",
        per_device_train_batch_size=2,
        logging_steps=1,
        save_strategy="no",
        parallelism_config=config,
        **checkpoint,
    )
    assert json.loads(args.to_json_string())["output_dir"] == folder
    model = tiny_model("llama", "usp" if config else "eager")
    trainer = Trainer(model=model, args=args, train_dataset=rows(6, 40))
    # Where there is a device to copy from, the copies of `offload` are pinned, which needs a GPU.
    with counting() as seen, patch.object(torch.cpu, "is_available", return_value=False):
        trainer.train()
    return {
        "losses": [h["loss"] for h in trainer.state.log_history if "loss" in h],
        "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
        "counts": trainer.state.global_step,
        "seen": seen,
    }


def test_the_stock_trainer(four_ranks: Ranks, tmp_path: Path) -> None:
    reference = train(str(tmp_path), 1, None)
    plain = four_ranks.run(train, str(tmp_path), 4, None)
    for options in OPTIONS.values():
        for mine, without in zip(four_ranks.run(train, str(tmp_path), 4, options), plain, strict=True):
            compare(mine, reference)
            assert mine["seen"] == without["seen"]


def test_reentrant_checkpointing_with_the_policy_is_refused_by_torch() -> None:
    model = tiny_model("llama", "usp").train()
    checkpointing(model, {**hf_usp.save_attention_outputs(), "use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(input_ids=torch.ones(1, 8, dtype=torch.long), use_cache=False)


def test_one_process_without_a_mesh() -> None:
    """Ordinary attention is recomputed as always; the policy changes nothing."""
    gradients = []
    for keywords in (None, hf_usp.save_attention_outputs()):
        model = tiny_model("llama", "usp").train()
        if keywords is not None:
            checkpointing(model, keywords)
        model(**batch_of("left"), use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert largest_difference(*gradients) == 0
