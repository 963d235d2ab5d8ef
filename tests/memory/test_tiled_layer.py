"""Layers in chunks, attention in groups of heads: the stock model's numbers in few bytes; layers that cannot do so."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import hf_usp
from hf_usp.integrations.transformers import apply_memory_options
from hf_usp.memory.activation_offload import offload_checkpoints
from hf_usp.memory.tiled_layer import tile_layers, tiled_layer, untile_layers

from ..harness import compare, one_process, relative, run_trainer, step
from ..models.census import tiny_model as census_model
from ..ranks import Ranks
from ..tiny import batch_of, tiny_model

GPT2 = {"n_embd": 32, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# One family for each way in which layers differ: its settings.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": True},
    "qwen3": {},  # norms of heads
    "gemma2": {"head_dim": 16},  # windows, softcap
    "cohere": {},  # attention and MLP side by side
    "gpt2": GPT2,  # arguments by position; queries, keys and values in one matrix
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4},  # sinks, experts
    "llama4_text": {"head_dim": 16, "num_local_experts": 2},  # places that layers count
    "deepseek_v3": {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
    | {"qk_nope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
    | {"first_k_dense_replace": 1, "moe_intermediate_size": 16, "num_experts_per_tok": 2},  # values of another width
}


def local(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A batch on a mesh of one rank."""
    return hf_usp.shard(batch, hf_usp.UspMesh.build(ring_degree=1, ulysses_degree=1))


def tiled_in(model: nn.Module) -> list[Any]:
    return [found for found in map(tiled_layer, model.modules()) if found is not None]


def worst(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest difference of a gradient, relative to the largest entry of that tensor."""
    assert mine.keys() == theirs.keys()
    return max(float((mine[n] - theirs[n]).abs().max() / theirs[n].abs().max().clamp_min(1e-6)) for n in theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_stock_model(family: str) -> None:
    """In two groups and in as many as there are heads; 37 tokens, so that the last chunk is shorter."""
    model = tiny_model(family, **FAMILIES[family]).train()
    batch = local(batch_of("packed"))
    loss, gradients, _ = step(model, **batch)
    for groups in (2, 4):
        assert len(tile_layers(model, 7, groups)) == 2
        for mine in (model, copy.deepcopy(model)) if groups == 2 else (model,):
            again, mine_gradients, _ = step(mine, **batch)
            assert again == pytest.approx(loss, rel=1e-6)
            assert worst(mine_gradients, gradients) < 1e-6
        with torch.no_grad():
            assert model(**batch, use_cache=False).loss.item() == pytest.approx(loss, rel=1e-6)
        for tiled in tiled_in(model):
            assert set(tiled.verdicts.values()) == {None} and len(tiled.verdicts) == 2
        assert len(tile_layers(model, 5, 1)) == 2 and tiled_in(model)[0].sizes.chunk == 7  # not twice
        untile_layers(model)
        assert not tiled_in(model)
    assert step(model, **batch)[0] == loss


@pytest.mark.parametrize("trained", ["up_proj", "layernorm", "q_proj"])
def test_frozen_weights_and_frozen_inputs(trained: str) -> None:
    """As with LoRA on some matrices, and in the first layer behind frozen embeddings."""
    model = tiny_model()
    for name, p in model.named_parameters():
        p.requires_grad_(trained in name)
    batch = local(batch_of("left"))
    gradients = step(model, **batch)[1]
    tile_layers(model, 7, 2)
    assert worst(step(model, **batch)[1], gradients) < 1e-6


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bf16_errs_as_the_stock_model_does(how: str) -> None:
    """All gradients together, against those in fp64."""
    model = tiny_model("qwen3", dtype=torch.bfloat16)
    batch = local(batch_of("plain", rows_count=4))
    truth = step(copy.deepcopy(model).double(), **batch)[1]
    model = model.to(torch.bfloat16 if how == "weights" else torch.float32)
    errors = []
    for groups in (None, 1, 4):
        untile_layers(model)
        if groups is not None:
            tile_layers(model, 8, groups)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            gradients = step(model, **batch)[1]
        assert {x.dtype for x in gradients.values()} == {model.dtype}
        errors.append(sum((gradients[name] - truth[name]).square().sum() for name in truth).sqrt().item())
    assert 0 < max(errors[1:]) <= 1.1 * errors[0], errors


def test_a_gradient_that_others_have_is_not_overwritten() -> None:
    """Hidden states that two terms of a loss read; hooks that keep gradients; the caller's own gradient."""
    model = tiny_model().model
    batch = local(batch_of("plain"))
    batch = {name: x for name, x in batch.items() if name not in ("labels", "shift_labels")}
    kept: list[torch.Tensor] = []

    def outcome() -> list[torch.Tensor]:
        model.zero_grad()
        kept.clear()
        states = model(**batch, use_cache=False, output_hidden_states=True).hidden_states
        states[1].register_hook(lambda grad: kept.append(grad))
        top = torch.full_like(states[-1], 0.5)
        torch.autograd.backward([states[-1], (states[1] * states[2]).sum()], [top, torch.tensor(1.0)])
        assert bool((top == 0.5).all())
        return [kept[-1].clone(), *(p.grad.clone() for p in model.parameters())]

    expected = outcome()
    tile_layers(model, 7, 2)
    for mine, theirs in zip(outcome(), expected, strict=True):
        assert relative(mine, theirs) < 1e-6


# As in `test_tiled_norm.py`, but for attention as wide as in real models, and narrow heads among it: rotary tables and
# log-sum-exps are small beside hidden states.
SIZES = {
    "vocab_size": 64,
    "hidden_size": 512,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 1 << 20,
}
LOCAL = 448  # tokens of a rank


def slopes(groups: int, times: tuple[float, ...], training: bool = True) -> list[float]:
    """Bytes of a step in bf16 on a ring of 4 that grow with local tokens, in hidden states, between two lengths each.

    Inputs of layers are in host memory, which does not count.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_usp.tools.live_bytes import LiveBytes
    from hf_usp.tools.simulate import ToHost

    mesh, peaks = hf_usp.UspMesh.build(ring_degree=4, ulysses_degree=1), []
    for size in (int(LOCAL * factor) for factor in times):
        config = LlamaConfig(**SIZES)
        llama = LlamaForCausalLM._from_config(config, attn_implementation="usp", dtype=torch.bfloat16).train()
        apply_memory_options(llama, 64, 64, False, layer_chunk_size=64, head_groups=groups)
        for p in llama.parameters():
            p.grad = torch.zeros_like(p)
        ids = torch.zeros(1, size * 4, dtype=torch.long)
        live = LiveBytes([x for p in llama.parameters() for x in (p, p.grad) if x is not None], inventory=False)
        offload_checkpoints(llama, ToHost(live))
        with torch.set_grad_enabled(training), live:
            loss = llama(**hf_usp.shard({"input_ids": ids, "labels": ids}, mesh), use_cache=False).loss
            if training:
                loss.backward()
        assert [set(tiled.verdicts.values()) for tiled in tiled_in(llama)] == [{None}] * 2
        peaks.append(live.peak)
    steps = [LOCAL * (b - a) * 512 * 2 for a, b in itertools.pairwise(times)]
    return [(b - a) / step for (a, b), step in zip(itertools.pairwise(peaks), steps, strict=True)]


@pytest.mark.parametrize(("groups", "most"), [(1, 11.0), (2, 7.0), (4, 5.5)])
def test_bytes_of_a_step_on_a_ring(four_ranks: Ranks, groups: int, most: float) -> None:
    """Whole layers, checkpointed, with MLPs and norms in chunks: 14; without: 22."""
    found = four_ranks.run(slopes, groups, (1.0, 2.0))
    assert max(max(each) for each in found) <= most, found


def test_bytes_of_an_evaluation_on_a_ring(four_ranks: Ranks) -> None:
    """Whole layers: 11. Rotary tables and log-sum-exps, small in a large model, are 0.2 of it here."""
    found = four_ranks.run(slopes, 4, (1.0, 2.0), False)
    assert max(max(each) for each in found) <= 4.8, found


class Mixing(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + x.roll(1, dims=1))


class Counting(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += x.shape[1]
        return super().forward(x)


def with_part(part: nn.Module) -> Any:
    model = tiny_model()
    model.model.layers[1].mlp.up_proj = part
    return model


def with_borrowed_weights() -> Any:
    model = tiny_model()
    borrowed = [model.model.norm.weight]
    part = nn.Linear(32, 64)
    part.forward = lambda x: nn.functional.linear(x * borrowed[0], part.weight)  # type: ignore[method-assign]
    model.model.layers[1].mlp.up_proj = part
    return model


def with_hooks() -> Any:
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.register_hook(lambda gradient: gradient * 2)
    return model


def replaced() -> Any:
    model = tiny_model()
    stock = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *args, **kwargs: stock(*args, **kwargs)
    return model


CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "mixing": (lambda: with_part(Mixing(32, 64)), "other values for some tokens"),
    "counting": (lambda: with_part(Counting(32, 64)), "writes into its buffers"),
    "dropout": (lambda: with_part(nn.Sequential(nn.Linear(32, 64), nn.Dropout(0.1))), "draws random numbers"),
    "borrowed": (with_borrowed_weights, "reads weights of other modules"),
    "hooks": (with_hooks, "gradient hooks"),
    "replaced": (replaced, "somebody has replaced"),
}


@pytest.mark.parametrize("case", CASES)
def test_other_layers_compute_as_before(case: str, caplog: pytest.LogCaptureFixture) -> None:
    """Beside a layer in chunks; the log says it once."""
    make, said = CASES[case]
    batch = local(batch_of("plain"))
    model = make().train()
    stock = copy.deepcopy(model) if case == "counting" else model  # copies lose hooks
    with caplog.at_level(logging.INFO, "hf_usp.memory"):
        loss, gradients, _ = step(stock, **batch)
        tile_layers(model, 7, 2)
        for _ in range(2):
            torch.manual_seed(0)
            again, mine, _ = step(model, **batch)
    if case != "dropout":
        assert again == pytest.approx(loss, rel=1e-6)
        assert worst(mine, gradients) < 1e-6
    if case == "counting":
        assert model.model.layers[1].mlp.up_proj.seen == 2 * 37  # not by the trial
    assert [said in record.message for record in caplog.records] == [True], caplog.text


def test_a_trial_leaves_random_numbers_alone() -> None:
    model = CASES["dropout"][0]().train()
    batch = local(batch_of("plain"))
    losses = []
    for tiled in (False, True):
        if tiled:
            tile_layers(model, 7, 1)
        torch.manual_seed(3)
        losses.append(step(model, **batch)[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_another_mode_in_the_backward_is_refused() -> None:
    model = tiny_model().train()
    tile_layers(model, 7, 1)
    loss = model(**local(batch_of("plain")), use_cache=False).loss
    model.eval()
    with pytest.raises(hf_usp.UspModelError, match=r"training is False in the backward.*Rule: .*Remedy: "):
        loss.backward()
    model.train()
    model(**local(batch_of("plain")), use_cache=False).loss.backward()
    model.eval()


def test_a_model_without_layers_to_compute_in_chunks_is_refused() -> None:
    """CTRL's layers are of a kind that Transformers cannot checkpoint; without the option it is prepared."""
    model = census_model("ctrl", "usp")
    with pytest.raises(hf_usp.UspModelError, match="no layer that Transformers can checkpoint"):
        apply_memory_options(model, None, None, False, layer_chunk_size=7, head_groups=1)
    apply_memory_options(model, None, None, False, layer_chunk_size=None, head_groups=None)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"layer_chunk_size": 0}, "layer_chunk_size=0"),
        ({"layer_chunk_size": 8, "head_groups": 0}, "head_groups=0"),
        ({"head_groups": 2}, "head_groups=2 without layer_chunk_size"),
        ({"layer_chunk_size": 8, "cp_size": 1}, "one rank has whole sequences"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(hf_usp.UspConfigError, match=named):
        hf_usp.UspParallelismConfig(**{"cp_size": 2, **options})


def on_a_mesh(ring: int, ulysses: int, family: str, groups: int, chunk: int) -> dict[str, Any]:
    """Loss, and gradients averaged over ranks, of a prepared model; or how it was refused."""
    model = tiny_model(family, **FAMILIES[family]).train()
    mesh = hf_usp.UspMesh.build(ring_degree=ring, ulysses_degree=ulysses)
    try:
        hf_usp.apply_context_parallel(model, mesh, layer_chunk_size=chunk, head_groups=groups)
    except hf_usp.UspError as refusal:
        return {"refused": str(refusal)}
    loss, gradients, _ = step(model, **batch_of("right", length=61))
    for gradient in gradients.values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    verdicts = [set(tiled.verdicts.values()) for tiled in tiled_in(model)]
    described = hf_usp.describe(model)
    hf_usp.remove_context_parallel(model)
    return {"loss": loss, "gradients": gradients, "verdicts": verdicts, "described": described, "left": tiled_in(model)}


@pytest.mark.parametrize(
    ("ring", "ulysses", "family", "groups"),
    [(4, 1, "llama", 4), (2, 2, "gpt_oss", 2), (1, 4, "llama", 1), (2, 2, "llama4_text", 2)],
)
def test_a_prepared_model(four_ranks: Ranks, ring: int, ulysses: int, family: str, groups: int) -> None:
    """Padded rows of 61 tokens in chunks of 5, self-check included."""
    reference = tiny_model(family, "eager", **FAMILIES[family]).train()
    loss, gradients, _ = step(reference, **batch_of("right", length=61))
    for mine in four_ranks.run(on_a_mesh, ring, ulysses, family, groups, 5):
        assert mine["loss"] == pytest.approx(loss, rel=1e-5)
        assert worst(mine["gradients"], gradients) < 5e-6
        assert mine["verdicts"] == [{None}] * 2 and mine["left"] == []
        assert "`layer_chunk_size`: layers compute in chunks" in mine["described"]


def test_more_groups_than_heads_are_refused_on_every_rank(four_ranks: Ranks) -> None:
    for mine in four_ranks.run(on_a_mesh, 2, 2, "llama", 3, 5):
        assert "head_groups=3 for 4 query heads on 2 ulysses rank(s)" in mine["refused"]


@pytest.mark.parametrize("mesh", [(4, 2, "zigzag"), (2, 1, "auto")], ids=str)
def test_the_stock_trainer_on_a_mesh(four_ranks: Ranks, tmp_path: Path, mesh: Any) -> None:
    """Under DDP, with accumulation, evaluation and checkpointing that others have switched on."""
    setup = {"rows": 12, "batch": 2, "accumulation": 2, "steps": 3, "evaluate": True, "eval_rows": 4, "family": "qwen2"}
    reference = one_process(setup)
    options = {"layer_chunk_size": 4, "head_groups": 2, "mlp_chunk_size": 3, "loss_chunk_size": 4}
    options |= {"offload_checkpoints": True, "keep_attention": 1}
    mine = {**setup, "options": options, "checkpointing": "non_reentrant"}
    for result in four_ranks.run(run_trainer, str(tmp_path), mesh, mine):
        compare(result, reference)
        assert result["norms"] == pytest.approx(reference["norms"], rel=1e-4)
        if mesh[0] == 4:
            assert result["evaluation"] == pytest.approx(reference["evaluation"], abs=1e-5)
