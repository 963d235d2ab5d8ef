"""Tensor parallelism of Transformers (`DistributedConfig`) around the mesh: TP inside, then ulysses, ring, data."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_usp.memory.tiled_layer import tiled_layer

from ..harness import fresh_accelerate, training_arguments
from ..ranks import Ranks
from ..tiny import largest_difference, rows, tiny_model


def saved(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> str:
    """A tiny model on disk: Transformers shards over TP while it loads."""
    path = str(folder / "model")
    tiny_model(family, "eager", dtype, **changes).save_pretrained(path)
    return path


def train(
    path: str, mesh: dict[str, int] | None, sharding: dict[str, Any] | None, batch: int, evaluate: bool = False
) -> dict[str, Any]:
    """Four SGD steps with the stock Trainer, a model loaded with `DistributedConfig(**sharding)`; an evaluation."""
    from transformers import AutoModelForCausalLM, Trainer
    from transformers.distributed import DistributedConfig

    import hf_usp

    fresh_accelerate()
    # Stock FSDP2 and TP together: an embedding whose output is a view, and gathers in two steps.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    args = training_arguments(
        path,
        save_strategy="no",
        max_steps=4,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=2,
        logging_steps=1,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.5,
        prediction_loss_only=True,
        parallelism_config=None if mesh is None else hf_usp.UspParallelismConfig(**mesh),
    )
    sharded = {} if sharding is None else {"distributed_config": DistributedConfig(**sharding)}
    attention = "eager" if mesh is None else "usp"
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention, dtype="auto", **sharded)
    trainer = Trainer(model=model, args=args, train_dataset=rows(40, 40), eval_dataset=rows(3, 40))
    trainer.train()
    layers = [layer for layer in map(tiled_layer, model.modules()) if layer is not None]
    if layers and model.config.model_type == "llama":
        assert [None in layer.verdicts.values() for layer in layers] == [True] * 2
    logs = trainer.state.log_history
    return {
        "losses": [entry["loss"] for entry in logs if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in logs if "grad_norm" in entry],
        "evaluation": trainer.evaluate()["eval_loss"] if evaluate else 0.0,
        "weights": {name: whole(p).clone() for name, p in model.state_dict().items()},
    }


def whole(p: torch.Tensor) -> torch.Tensor:
    return p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()


def compare(results: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    for mine in results:
        assert mine["losses"] == pytest.approx(reference["losses"], abs=1e-5)
        assert mine["evaluation"] == pytest.approx(reference["evaluation"], abs=1e-5)
        assert mine["norms"] == pytest.approx(reference["norms"], rel=1e-4)
        assert largest_difference(mine["weights"], reference["weights"]) < 1e-6


@pytest.mark.parametrize("ulysses", [1, 2])
@pytest.mark.parametrize("heads", [(4, 2), (6, 6)], ids=str)
def test_tp_around_the_mesh(four_ranks: Ranks, tmp_path: Path, heads: tuple[int, int], ulysses: int) -> None:
    """(6, 6): three heads after TP, split unevenly over two ulysses ranks; norms inside heads; widths that TP cuts
    unevenly. With ulysses, MLPs in chunks, else layers (but those with norms inside heads)."""
    changes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "hidden_size": 8 * heads[0]}
    uneven = {"head_dim": 8, "intermediate_size": 65, "vocab_size": 65}
    path = saved(tmp_path, **changes) if heads == (4, 2) else saved(tmp_path, "qwen3", **changes, **uneven)
    mesh, sharding = {"cp_size": 2, "ulysses_degree": ulysses}, {"tp_size": 2, "fsdp_size": 2}
    mesh |= {"mlp_chunk_size": 7} if ulysses > 1 else {"layer_chunk_size": 7}
    compare(four_ranks.run(train, path, mesh, sharding, 2), train(path, None, None, 2))


GEMMA: dict[str, Any] = {"final_logit_softcapping": 3.0, "head_dim": 16, "tie_word_embeddings": False}
OVER_ROWS = {"tp_size": 2, "fsdp_size": 2}
# Family, its settings, how it is sharded.
CHUNKED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "softcap": ("gemma2", {**GEMMA, "vocab_size": 67}, OVER_ROWS),
    "tied": ("qwen2", {"tie_word_embeddings": True}, OVER_ROWS),
    "whole": ("llama", {}, {**OVER_ROWS, "tp_plan": {"lm_head": "replicate"}}),
    "fsdp": ("qwen2", {}, {"fsdp_size": 4}),
}


@pytest.mark.parametrize("case", CHUNKED)
def test_the_loss_in_chunks(four_ranks: Ranks, tmp_path: Path, case: str) -> None:
    """Each TP rank has the logits of its rows of the head alone; two ranks do not share 67 of them evenly. "whole": a
    plan that leaves the head alone. "fsdp": Transformers' own FSDP without TP. MLPs in chunks, too."""
    family, changes, sharding = CHUNKED[case]
    path = saved(tmp_path, family, **changes)
    mesh = {"cp_size": sharding["fsdp_size"], "ulysses_degree": 2, "loss_chunk_size": 7, "mlp_chunk_size": 7}
    compare(four_ranks.run(train, path, mesh, sharding, 2, True), train(path, None, None, 2, True))


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}


@pytest.mark.parametrize(
    "sharding", [{"fsdp_size": 4, "ep_size": 4}, {"fsdp_size": 2, "tp_size": 2, "ep_size": 2}], ids=str
)
def test_experts_dealt_to_ranks(four_ranks: Ranks, tmp_path: Path, sharding: dict[str, int]) -> None:
    """Expert parallelism over the ranks of the mesh, alone and with TP."""
    path, mesh = saved(tmp_path, "qwen3_moe", **MOE), {"cp_size": sharding["fsdp_size"], "ulysses_degree": 2}
    compare(four_ranks.run(train, path, mesh, sharding, 2), train(path, None, None, 2))


def test_four_axes_on_eight_processes(tmp_path: Path) -> None:
    """TP 2 x ulysses 2 x ring 1 x FSDP2 2, each axis with its own process groups."""
    path = saved(tmp_path)
    ranks = Ranks(8)
    try:
        results = ranks.run(train, path, {"cp_size": 2}, {"tp_size": 2, "fsdp_size": 4}, 1, timeout=120)
    finally:
        ranks.stop()
    compare(results, train(path, None, None, 2))


def refusal(path: str, loss_chunk_size: int | None = None, **sharding: Any) -> str:
    import hf_usp

    mesh: dict[str, Any] = {"cp_size": 2, "loss_chunk_size": loss_chunk_size}
    try:
        train(path, mesh, {**OVER_ROWS, **sharding}, 2)
    except hf_usp.UspError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("heads", [(3, 3), (4, 1)], ids=str)
def test_tp_that_cuts_through_a_head_is_refused(four_ranks: Ranks, tmp_path: Path, heads: tuple[int, int]) -> None:
    changes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "hidden_size": 8 * heads[0]}
    for message in four_ranks.run(refusal, saved(tmp_path, **changes)):
        assert "tp_size=2" in message and "Remedy" in message


def test_experts_alone_on_a_rank_in_fp16_are_refused(four_ranks: Ranks, tmp_path: Path) -> None:
    for message in four_ranks.run(refusal, saved(tmp_path, "qwen3_moe", torch.float16, **MOE), ep_size=4):
        assert "torch.float16 under ep_size=4" in message and "Remedy" in message


@pytest.mark.parametrize("style", ["rowwise_rep", "colwise"])
def test_a_head_in_another_layout_with_the_loss_in_chunks_is_refused(
    four_ranks: Ranks, tmp_path: Path, style: str
) -> None:
    """Logits that are sums over ranks; logits that Transformers itself would not gather."""
    for message in four_ranks.run(refusal, saved(tmp_path), loss_chunk_size=7, tp_plan={"lm_head": style}):
        assert (
            f"LlamaForCausalLM under tp_size=2, whose vocabulary head (FSDPLinear) is laid out as '{style}'" in message
        )


def test_tied_embeddings_that_fsdp_pads_are_refused(four_ranks: Ranks, tmp_path: Path) -> None:
    """A case that Transformers alone trains wrong: after a step one of the two has another weight than the other."""
    path = saved(tmp_path, "qwen2", tie_word_embeddings=True, vocab_size=66)
    for message in four_ranks.run(refusal, path):
        assert "66 entries under fsdp_size=2, tp_size=2" in message and "pad_to_multiple_of=4" in message
