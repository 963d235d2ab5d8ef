"""Tiny models of the families people train: loss, logits and gradients equal the eager single-process model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from ..harness import fresh_accelerate
from ..ranks import Ranks
from ..tiny import FAMILIES, batch_of, tiny_model

MESHES = [(4, 1), (2, 2), (1, 4)]
KINDS = ["plain", "packed", "left", "right"]


def relative(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((mine - theirs).norm() / theirs.norm().clamp_min(1e-6)).item()


def errors(family: str, ring: int, ulysses: int, kind: str, changes: dict[str, Any]) -> dict[str, float]:
    """Largest relative errors of a hand-written step (`shard`, model, average over ranks) against eager."""
    import hf_usp

    reference = tiny_model(family, "eager", **changes).train()
    model = tiny_model(family, "usp", **changes).train()
    batch = batch_of(kind)
    expected = reference(**batch, use_cache=False)
    expected.loss.backward()
    mesh = hf_usp.UspMesh.build(ring_degree=ring, ulysses_degree=ulysses)
    share = hf_usp.shard(batch, mesh)
    out = model(**share, use_cache=False)
    out.loss.backward()
    loss = out.loss.detach().clone()
    dist.all_reduce(loss)
    logits = hf_usp.unshard(out.logits.detach(), share["usp"])
    seen = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    gradients = 0.0
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        dist.all_reduce(mine.grad)
        gradients = max(gradients, relative(mine.grad / dist.get_world_size(), theirs.grad))
    return {
        "loss": abs(loss.item() / dist.get_world_size() - expected.loss.item()),
        "logits": relative(logits[seen], expected.logits.detach()[seen]),
        "gradients": gradients,
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_eager(four_ranks: Ranks, family: str, mesh: tuple[int, int], kind: str) -> None:
    for worst in four_ranks.run(errors, family, *mesh, kind, {}):
        assert max(worst.values()) < 1e-4, worst


@pytest.mark.parametrize("heads", [(14, 2), (7, 1), (4, 1), (9, 3), (3, 3)], ids=str)
def test_any_number_of_heads(four_ranks: Ranks, heads: tuple[int, int]) -> None:
    changes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "hidden_size": 8 * heads[0]}
    for worst in four_ranks.run(errors, "llama", 1, 4, "packed", changes):
        assert max(worst.values()) < 1e-4, worst


def prepared_errors(ring_ulysses: tuple[int, int], kind: str, as_embeddings: bool, with_items: bool) -> dict[str, Any]:
    """The same through `Accelerator.prepare`, which takes the full batch; gathered outputs."""
    from accelerate import Accelerator

    import hf_usp

    fresh_accelerate()
    cp_size = ring_ulysses[0] * ring_ulysses[1]
    config = hf_usp.UspParallelismConfig(cp_size=cp_size, ulysses_degree=ring_ulysses[1], gather_outputs=True)
    accelerator = Accelerator(cpu=True, parallelism_config=config)
    reference, model = tiny_model("qwen3", "eager"), tiny_model("qwen3", "usp")
    # DDP waits for gradients of every parameter; embeddings that come from outside give none.
    model.get_input_embeddings().requires_grad_(not as_embeddings)
    prepared = accelerator.prepare(model)
    batch = batch_of(kind)
    expected = reference(**batch, use_cache=False, output_hidden_states=True)
    expected.loss.backward()
    if as_embeddings:
        batch["inputs_embeds"] = model.get_input_embeddings().weight.detach()[batch.pop("input_ids")]
    items = (batch["labels"][:, 1:] != -100).sum() if with_items else None
    out = prepared(**batch, output_hidden_states=True, **({"num_items_in_batch": items} if with_items else {}))
    accelerator.backward(out.loss)
    seen = batch.get("attention_mask", torch.ones_like(batch["labels"])).bool()
    names = [n for n, p in model.named_parameters() if p.grad is not None and "embed_tokens" not in n]
    grads = {n: (p.grad, dict(reference.named_parameters())[n].grad) for n, p in model.named_parameters() if n in names}
    return {
        "loss": abs(out.loss.item() - expected.loss.item()),
        "logits": relative(out.logits.detach()[seen], expected.logits.detach()[seen]),
        "hidden": relative(out.hidden_states[1].detach()[seen], expected.hidden_states[1].detach()[seen]),
        "gradients": max(relative(a, b) for a, b in grads.values()),
        "shape": float(out.logits.shape != expected.logits.shape),
        "wrapped": float(type(prepared).__name__ != "DistributedDataParallel"),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mesh", [(2, 2), (4, 1), (1, 2)], ids=str)
def test_prepared_model_takes_the_full_batch(four_ranks: Ranks, mesh: tuple[int, int], kind: str) -> None:
    for worst in four_ranks.run(prepared_errors, mesh, kind, False, False):
        assert max(worst.values()) < 1e-4, worst


@pytest.mark.parametrize("as_embeddings", [True, False])
def test_prepared_model_with_embeddings_and_a_token_count(four_ranks: Ranks, as_embeddings: bool) -> None:
    for worst in four_ranks.run(prepared_errors, (2, 2), "packed", as_embeddings, True):
        assert max(worst.values()) < 1e-4, worst


def generation(prepare: bool) -> list[list[int]]:
    """Greedy tokens of the plain and the prepared model."""
    from accelerate import Accelerator

    import hf_usp

    fresh_accelerate()
    model = tiny_model("qwen2", "usp" if prepare else "sdpa").eval()
    if prepare:
        config = hf_usp.UspParallelismConfig(cp_size=4, ulysses_degree=2)
        model = Accelerator(cpu=True, parallelism_config=config).prepare(model).module
    prompt = batch_of("left")
    inputs = {"input_ids": prompt["input_ids"], "attention_mask": prompt["attention_mask"]}
    made = []
    for use_cache in (True, False):
        made += model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=use_cache).tolist()
    return made


def test_generate_is_not_sharded(four_ranks: Ranks) -> None:
    expected = generation(False)
    assert all(tokens == expected for tokens in four_ranks.run(generation, True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt_oss"])
def test_unsharded_calls_are_ordinary_attention(family: str, kind: str) -> None:
    """Without `prepare`, "usp" in one process gives the numbers of the eager model, softcap and sinks included."""
    import hf_usp  # noqa: F401  registers "usp"

    changes = {"sliding_window": 6, "head_dim": 16} if family in ("gemma2", "gpt_oss") else {}
    batch = batch_of(kind)
    expected = tiny_model(family, "eager", **changes).eval()(**batch)
    got = tiny_model(family, "usp", **changes).eval()(**batch)
    seen = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    torch.testing.assert_close(got.logits[seen], expected.logits[seen], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.loss, expected.loss)


def rope_errors(family: str, rope: dict[str, Any], length: int) -> dict[int, float]:
    """Length -> relative error of prepared logits where frequencies depend on the length of the sequence."""
    from accelerate import Accelerator

    import hf_usp

    fresh_accelerate()
    changes = {"max_position_embeddings": 64, "rope_parameters": rope, "initializer_range": 0.3}
    if rope["rope_type"] == "longrope":
        changes["original_max_position_embeddings"] = 24
    reference, model = tiny_model(family, "eager", **changes), tiny_model(family, "usp", **changes)
    config = hf_usp.UspParallelismConfig(cp_size=4, ulysses_degree=1, sequence_order="contiguous", gather_outputs=True)
    prepared = Accelerator(cpu=True, parallelism_config=config).prepare(model)
    errors = {}
    for size in (length, 12, length + 3):
        ids = torch.randint(3, 64, (1, size), generator=torch.Generator().manual_seed(size))
        expected = reference(input_ids=ids).logits.detach()
        errors[size] = relative(prepared(input_ids=ids, labels=ids).logits.detach(), expected)
    return errors


ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "factor": 2.0,
        "original_max_position_embeddings": 24,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 24},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 24,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_rope_that_depends_on_the_length_uses_the_global_one(four_ranks: Ranks, kind: str) -> None:
    for errors in four_ranks.run(rope_errors, "llama", ROPES[kind], 80):
        assert max(errors.values()) < 1e-4, errors


def flattened_errors(with_positions: bool) -> float:
    """Relative error of logits for a batch of the flattening collator, against eager on each document alone."""
    from transformers import DataCollatorWithFlattening

    import hf_usp

    documents = [
        torch.randint(3, 64, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 19, 1, 12)
    ]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=with_positions)
    batch = dict(collate([{"input_ids": ids} for ids in documents]))
    reference, model = tiny_model("llama", "eager"), tiny_model("llama", "usp")
    expected = torch.cat([reference(input_ids=torch.tensor([ids])).logits for ids in documents], dim=1)
    share = hf_usp.shard(batch, hf_usp.UspMesh.build(ring_degree=2, ulysses_degree=2))
    assert "cu_seq_lens_q" not in share
    logits = hf_usp.unshard(model(**share, use_cache=False).logits, share["usp"])
    return relative(logits.detach(), expected.detach())


@pytest.mark.parametrize("with_positions", [True, False])
def test_flattened_documents_do_not_see_each_other(four_ranks: Ranks, with_positions: bool) -> None:
    # Without position_ids the documents are told apart by cu_seq_lens alone; rotary positions are relative.
    for error in four_ranks.run(flattened_errors, with_positions):
        assert error < 1e-4


BEYOND = {
    "gemma2": {"head_dim": 16, "sliding_window": 6, "attn_logit_softcapping": 2.0, "initializer_range": 0.3},
    "gpt_oss": {"head_dim": 16, "sliding_window": 6, "num_local_experts": 4, "initializer_range": 0.3},
    "qwen3_moe": {"head_dim": 16, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
}


# In one process gpt-oss mixes packed documents; see the next test.
CASES = [(family, kind) for family in BEYOND for kind in KINDS if (family, kind) != ("gpt_oss", "packed")]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_softcap_sinks_and_experts(four_ranks: Ranks, family: str, kind: str) -> None:
    for worst in four_ranks.run(errors, family, 2, 2, kind, BEYOND[family]):
        assert max(worst.values()) < 2e-4, worst


def packed_verdict(family: str, changes: dict[str, Any], with_edges: bool) -> str:
    """The outputs of a prepared model for packed documents."""
    from accelerate import Accelerator

    import hf_usp

    fresh_accelerate()
    config = hf_usp.UspParallelismConfig(cp_size=4, ulysses_degree=2, gather_outputs=True)
    model = Accelerator(cpu=True, parallelism_config=config).prepare(tiny_model(family, "usp", **changes))
    lengths = (9, 4, 20)
    ids = torch.randint(3, 64, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    if with_edges:
        batch["cu_seq_lens_q"] = torch.tensor([0, 9, 13, 33], dtype=torch.int32)
    try:
        logits = model(**batch).logits
    except hf_usp.UspModelError as error:
        return str(error)
    reference = tiny_model(family, "eager", **changes)
    alone = torch.cat([reference(input_ids=part).logits for part in ids.split(lengths, dim=1)], dim=1)
    return f"{relative(logits.detach(), alone.detach()) < 1e-4}"


def test_a_model_that_mixes_packed_documents_is_told(four_ranks: Ranks) -> None:
    """gpt-oss ignores restarting position_ids in eager attention; cu_seq_lens say what is meant."""
    assert all("cu_seq_lens_q" in x for x in four_ranks.run(packed_verdict, "gpt_oss", BEYOND["gpt_oss"], False))
    assert four_ranks.run(packed_verdict, "gpt_oss", BEYOND["gpt_oss"], True) == ["True"] * 4
    assert four_ranks.run(packed_verdict, "llama", {}, False) == ["True"] * 4


def hand_loop_rope_error(kind: str) -> float:
    """The same for a hand-written loop, which attaches no hooks to the model."""
    import hf_usp

    changes = {"max_position_embeddings": 64, "rope_parameters": ROPES[kind], "initializer_range": 0.3}
    reference, model = tiny_model("llama", "eager", **changes), tiny_model("llama", "usp", **changes)
    ids = torch.randint(3, 64, (1, 80), generator=torch.Generator().manual_seed(0))
    share = hf_usp.shard({"input_ids": ids}, hf_usp.UspMesh.build(ring_degree=4, ulysses_degree=1), order="contiguous")
    logits = hf_usp.unshard(model(**share, use_cache=False).logits, share["usp"])
    return relative(logits.detach(), reference(input_ids=ids).logits.detach())


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_hand_written_loops_use_the_global_length_too(four_ranks: Ranks, kind: str) -> None:
    assert max(four_ranks.run(hand_loop_rope_error, kind)) < 1e-4


def meshes_of_a_device_mesh() -> list[tuple[int, ...]]:
    """(ring degree, ulysses degree, ring rank, ulysses rank, *ranks) for three device meshes."""
    from torch.distributed.device_mesh import init_device_mesh

    import hf_usp

    plain = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
    around = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    whole = init_device_mesh("cpu", (4,), mesh_dim_names=("cp",))
    build = hf_usp.UspMesh.from_device_mesh
    meshes = [build(plain), build(around), build(whole, ulysses_degree=2)]
    return [(m.ring_degree, m.ulysses_degree, m.ring_rank, m.ulysses_rank, *m.ranks) for m in meshes]


def test_a_mesh_out_of_a_device_mesh(four_ranks: Ranks) -> None:
    for rank, found in enumerate(four_ranks.run(meshes_of_a_device_mesh)):
        square = (2, 2, rank // 2, rank % 2, 0, 1, 2, 3)
        first = rank - rank % 2
        assert found == [square, (1, 2, 0, rank % 2, first, first + 1), square]
