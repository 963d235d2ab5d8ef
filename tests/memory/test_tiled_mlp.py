"""MLPs and norms in chunks: the stock model's numbers, without what they hold inside; MLPs that mix are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import Peak
from torch import nn

import hf_usp
from hf_usp.integrations.transformers import apply_memory_options
from hf_usp.memory.tiled_mlp import TiledMLP, chunked, tile_mlps, tiled_forward, untile
from hf_usp.memory.tiled_norm import TiledNorm

from ..harness import compare, one_process, run_trainer, step
from ..ranks import Ranks
from ..tiny import batch_of, largest_difference, tiny_model

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# Family -> its settings, its norms that compute in chunks.
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "llama": ({"mlp_bias": True}, 5),
    "qwen2": ({}, 5),
    "qwen3": ({}, 9),  # norms of heads
    "gemma2": ({"head_dim": 16}, 9),
    "gemma3_text": ({"head_dim": 16}, 13),  # norms of heads, heads before tokens
    "phi3": ({}, 5),  # gate and up in one matrix
    "cohere": ({}, 3),  # attention and MLP side by side
    "olmo": ({}, 5),  # norms without weights
    "olmo2": ({}, 9),  # norms of all heads together, norms behind layers
    "gpt_neox": ({}, 0),  # two matrices with biases; norms of torch
    "gpt2": ({"n_embd": 32, "n_head": 4, **NO_DROPOUT}, 0),  # matrices that are not nn.Linear
}


def in_chunks(model: nn.Module, chunk: int, kind: Any) -> int:
    """How many modules of a kind compute in chunks, once the option is applied."""
    apply_memory_options(model, None, chunk, False)
    return sum(chunked(module, kind) for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_stock_model(family: str) -> None:
    settings, norms = FAMILIES[family]
    model = tiny_model(family, "eager", **settings).train()
    batch = batch_of("plain")
    loss, gradients, _ = step(model, **batch)
    assert (in_chunks(model, 7, TiledMLP), in_chunks(model, 7, TiledNorm)) == (2, norms)  # 74 tokens: a shorter last
    for mine in (model, copy.deepcopy(model)):
        again, mine_gradients, _ = step(mine, **batch)
        assert again == pytest.approx(loss, rel=1e-6)
        assert largest_difference(mine_gradients, gradients) < 1e-6
        assert mine.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        assert model(**batch).loss.item() == pytest.approx(loss, rel=1e-6)
    assert all(tiled_forward(x).found is None for x in model.modules() if chunked(x, TiledNorm))
    assert (in_chunks(model, 5, TiledMLP), in_chunks(model, 5, TiledNorm)) == (2, norms)  # not twice
    untile(model)
    assert not any(chunked(module) for module in model.modules())
    assert step(model, **batch)[0] == loss


@pytest.mark.parametrize("trained", ["up_proj", "layernorm"])
def test_frozen_weights_and_frozen_inputs(trained: str) -> None:
    """As with LoRA on some matrices, and in the first layer behind frozen embeddings."""
    model = tiny_model(attention="eager")
    for name, p in model.named_parameters():
        p.requires_grad_(trained in name)
    gradients = step(model, **batch_of("plain"))[1]
    apply_memory_options(model, None, 7, False)
    mine = step(model, **batch_of("plain"))[1]
    assert mine.keys() == gradients.keys()
    assert len(mine) in (2, 4)
    assert largest_difference(mine, gradients) < 1e-6


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bf16_errs_as_the_stock_model_does(how: str) -> None:
    """All gradients together, against those in fp64."""
    batch = batch_of("plain", rows_count=4)
    model = tiny_model("qwen3", attention="sdpa", dtype=torch.bfloat16)
    truth = step(copy.deepcopy(model).double(), **batch)[1]
    model = model.to(torch.bfloat16 if how == "weights" else torch.float32)
    errors = []
    for chunk in (None, 5):
        apply_memory_options(model, None, chunk, False)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            gradients = step(model, **batch)[1]
        assert {x.dtype for x in gradients.values()} == {model.dtype}
        errors.append(sum((gradients[name] - truth[name]).square().sum() for name in truth).sqrt().item())
    assert 0 < errors[1] <= 1.1 * errors[0], errors


def test_the_peak_is_without_what_lies_between_the_matrices() -> None:
    """A step of MLPs 32 times as wide as hidden states: whole ones hold three such tensors in each layer."""
    model = tiny_model(attention="sdpa", hidden_size=16, intermediate_size=512, num_hidden_layers=3)
    ids = torch.randint(3, 64, (1, 1024))
    peaks = []
    for chunk in (None, 128):
        if chunk is not None:
            tile_mlps(model, chunk)
        with Peak() as watch:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        peaks.append(watch.peak)
    between = 1024 * 512 * 4
    assert peaks[0] > 3 * 3 * between
    assert peaks[1] < 2 * between


@pytest.mark.parametrize(
    ("mesh", "checkpointing"), [((4, 2, "zigzag"), "non_reentrant"), ((2, 1, "auto"), "reentrant")], ids=str
)
def test_the_stock_trainer_on_a_mesh(four_ranks: Ranks, tmp_path: Path, mesh: Any, checkpointing: str) -> None:
    setup = {"rows": 12, "batch": 2, "accumulation": 2, "steps": 3, "evaluate": True, "eval_rows": 4, "family": "qwen2"}
    reference = one_process(setup)
    options = {"mlp_chunk_size": 3, "loss_chunk_size": 4, "offload_checkpoints": True}
    mine = {**setup, "options": options, "checkpointing": checkpointing}
    for result in four_ranks.run(run_trainer, str(tmp_path), mesh, mine):
        compare(result, reference)
        assert result["norms"] == pytest.approx(reference["norms"], rel=1e-4)
        if mesh[0] == 4:
            assert result["evaluation"] == pytest.approx(reference["evaluation"], abs=1e-5)


def test_also_in_one_process(tmp_path: Path) -> None:
    setup = {"rows": 4, "batch": 2, "steps": 2}
    mine = one_process({**setup, "options": {"mlp_chunk_size": 3}})
    compare(mine, one_process(setup))


class Mixing(nn.Module):
    """An MLP that looks at the token before."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x + x.roll(1, dims=1)))


def changed(case: str) -> Any:
    if case == "experts":
        return tiny_model("qwen3_moe", "eager", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    if case == "dropout":
        return tiny_model("gpt2", "eager", **{**FAMILIES["gpt2"][0], "resid_pdrop": 0.1})
    if case == "none":
        return tiny_model("opt", "eager", ffn_dim=64)
    model = tiny_model(attention="eager")
    if case == "mixing":
        model.model.layers[1].mlp = Mixing()
    elif case == "replaced":
        model.model.layers[1].mlp.forward = lambda x: x
    return model


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("experts", "experts or convolutions"),
        ("dropout", "drops out values"),
        ("none", "no MLP as a module"),
        ("mixing", "Mixing, which gives other values"),
        ("replaced", "somebody has replaced"),
    ],
)
def test_other_mlps_are_refused(case: str, named: str) -> None:
    with pytest.raises(hf_usp.UspModelError, match=f"mlp_chunk_size with .*{named}.*Rule: .*Remedy: "):
        tile_mlps(changed(case), 8)


def test_weights_that_exist_later_are_tried_at_the_first_call() -> None:
    with torch.device("meta"):
        model = tiny_model(attention="eager")
        model.model.layers[0].mlp = Mixing()
    tile_mlps(model, 8)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            nn.init.normal_(p, std=0.1)
    with pytest.raises(hf_usp.UspModelError, match="with Mixing, which gives other values"):
        model.model.layers[0].mlp(torch.randn(1, 20, 32))
