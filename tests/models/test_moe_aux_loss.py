"""The load-balancing loss of a mixture of experts: what one process computes, on every mesh, with any padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hf_usp

from ..harness import compare, fresh_accelerate, one_process, prepared, run_trainer
from ..ranks import Ranks
from ..tiny import batch_of, tiny_model

EXPERTS: dict[str, Any] = {
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    # Of the size of the loss itself, so that nothing hides.
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
    "initializer_range": 0.3,
}


def batch_with(form: str) -> dict[str, torch.Tensor]:
    """As in other tests; "far right" pads so much that a rank of a contiguous order holds nothing else."""
    batch = batch_of("right" if "right" in form else form)
    if form == "far right":
        batch["attention_mask"][:, 20:], batch["labels"][:, 20:] = 0, -100
    return batch


def router_errors(ring: int, ulysses: int, form: str, with_items: bool) -> dict[str, float]:
    """Errors of a prepared model against one process; the gradients are those after DDP's average over ranks."""
    from accelerate import Accelerator

    fresh_accelerate()
    order = "contiguous" if form == "far right" else "auto"
    config = hf_usp.UspParallelismConfig(
        cp_size=4, ulysses_degree=ulysses, gather_outputs=with_items, sequence_order=order
    )
    model = Accelerator(cpu=True, parallelism_config=config).prepare(tiny_model("qwen3_moe", "usp", **EXPERTS))
    reference = tiny_model("qwen3_moe", "eager", **EXPERTS)
    batch = batch_with(form)
    items = {"num_items_in_batch": (batch["labels"][:, 1:] != -100).sum() + 5} if with_items else {}
    expected, got = reference(**batch, **items, use_cache=False), model(**batch, **items)
    assert list(got) == list(expected)
    loss = got.loss
    expected.loss.backward()
    loss.backward()
    pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), reference.parameters(), strict=True)]
    found = {
        "loss": (loss - expected.loss).abs().item(),
        "aux_loss": (got.aux_loss - expected.aux_loss).abs().item(),
        "gradients": max(((p - q).norm() / q.norm().clamp_min(1e-6)).item() for p, q in pairs),
    }
    if with_items:
        seen = batch.get("attention_mask", torch.ones_like(batch["labels"])).bool().flatten()
        for mine, theirs in zip(got.router_logits, expected.router_logits, strict=True):
            found["router_logits"] = (mine[seen] - theirs[seen]).abs().max().item()
    return found


@pytest.mark.parametrize("form", ["plain", "packed", "right", "left", "far right"])
@pytest.mark.parametrize("mesh", [(2, 2), (4, 1), (1, 4)], ids=str)
def test_auxiliary_loss_and_all_gradients(four_ranks: Ranks, mesh: tuple[int, int], form: str) -> None:
    for found in four_ranks.run(router_errors, *mesh, form, mesh == (2, 2)):
        assert max(found.values()) < 1e-4, found


def test_the_trainer_adds_it_to_every_micro_batch(four_ranks: Ranks, tmp_path: Path) -> None:
    """With accumulation the token losses are divided by all tokens, the auxiliary loss of each batch by nothing."""
    setup = {"rows": 12, "batch": 2, "accumulation": 2, "steps": 3, "family": "qwen3_moe", "changes": EXPERTS}
    reference = one_process(setup)
    without = one_process({**setup, "changes": {**EXPERTS, "router_aux_loss_coef": 0.0}})
    assert reference["losses"][0] > without["losses"][0] + 1.0
    for mine in four_ranks.run(run_trainer, str(tmp_path), (4, 2, "auto"), setup):
        compare(mine, reference, weights=1e-5)


def lone_error() -> float:
    """Without labels there is an auxiliary loss too, which a caller may add to a loss of his own."""
    model, reference = prepared("qwen3_moe", **EXPERTS), tiny_model("qwen3_moe", "eager", **EXPERTS)
    ids = batch_of("plain")["input_ids"]
    expected, got = reference(input_ids=ids), model(input_ids=ids, output_router_logits=True)
    expected.aux_loss.backward()
    # DDP waits for every parameter.
    (got.aux_loss + 0.0 * got.logits.sum()).backward()
    mine = model.module.model.layers[0].mlp.gate.weight.grad
    theirs = reference.model.layers[0].mlp.gate.weight.grad
    return max((got.aux_loss - expected.aux_loss).abs().item(), (mine - theirs).abs().max().item())


def test_without_labels(four_ranks: Ranks) -> None:
    assert max(four_ranks.run(lone_error)) < 1e-5


def refusal(case: str) -> str:
    """The message to a model whose auxiliary loss is another, on one rank or all; and to hand-written loops."""
    from unittest.mock import patch

    import torch.distributed as dist
    from transformers.models.qwen3_moe import modeling_qwen3_moe as module

    known = module.load_balancing_loss_func
    if case == "by hand":
        share = hf_usp.shard(batch_of("plain"), hf_usp.UspMesh.build(ring_degree=2, ulysses_degree=2))
        try:
            tiny_model("qwen3_moe", "usp", **EXPERTS)(**share, use_cache=False)
        except hf_usp.UspModelError as error:
            return str(error)
        return "passed"
    others = {
        "squared": lambda *args: known(*args) ** 2,
        "padding counts": lambda logits, experts, chosen, mask: known(logits, experts, chosen, None),
        "one rank": lambda *args: known(*args) * (1.01 if dist.get_rank() == 2 else 1.0),
    }
    with patch.object(module, "load_balancing_loss_func", others[case]):
        try:
            prepared("qwen3_moe", **EXPERTS)(**batch_of("plain"))
        except hf_usp.UspError as error:
            return str(error)
    return "passed"


@pytest.mark.parametrize("case", ["squared", "padding counts", "one rank", "by hand"])
def test_other_formulas_are_refused_on_every_rank(four_ranks: Ranks, case: str) -> None:
    for message in four_ranks.run(refusal, case, timeout=40):
        assert "output_router_logits" in message, message
