"""MLPs in chunks: the numbers of whole MLPs, without what they hold between their matrices; refused where they mix."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import Peak
from torch import nn

import hf_usp
from hf_usp.memory.tiled_mlp import chunked, tile_mlps, untile_mlps

from ..harness import compare, one_process, run_trainer, step
from ..ranks import Ranks
from ..tiny import batch_of, largest_difference, tiny_model

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": True},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16},
    "phi3": {},  # gate and up in one matrix
    "cohere": {},  # attention and MLP side by side
    "gpt_neox": {},  # two matrices with biases
    "gpt2": {"n_embd": 32, "n_head": 4, **NO_DROPOUT},  # matrices that are not nn.Linear
}


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_whole_mlps(family: str) -> None:
    model = tiny_model(family, "eager", **FAMILIES[family]).train()
    batch = batch_of("plain")
    loss, gradients, _ = step(model, **batch)
    assert len(tile_mlps(model, 7)) == 2  # 74 tokens: the last chunk is shorter
    for mine in (model, copy.deepcopy(model)):
        again, mine_gradients, _ = step(mine, **batch)
        assert again == pytest.approx(loss, rel=1e-6)
        assert largest_difference(mine_gradients, gradients) < 1e-6
        assert mine.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        assert model(**batch).loss.item() == pytest.approx(loss, rel=1e-6)
    assert len(tile_mlps(model, 5)) == 2  # not twice
    untile_mlps(model)
    assert not any(chunked(module) for module in model.modules())
    assert step(model, **batch)[0] == loss


def test_frozen_weights_and_frozen_inputs() -> None:
    """As with LoRA on some matrices, and in the first layer behind frozen embeddings."""
    model = tiny_model(attention="eager")
    for name, p in model.named_parameters():
        p.requires_grad_("up_proj" in name)
    gradients = step(model, **batch_of("plain"))[1]
    tile_mlps(model, 7)
    mine = step(model, **batch_of("plain"))[1]
    assert len(mine) == 2
    assert largest_difference(mine, gradients) < 1e-6


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bf16_errs_as_whole_mlps_do(how: str) -> None:
    name, batch = "model.layers.0.mlp.down_proj.weight", batch_of("plain", rows_count=4)
    truth = step(tiny_model(attention="sdpa"), **batch)[1][name]
    model = tiny_model(attention="sdpa", dtype=torch.bfloat16 if how == "weights" else torch.float32)
    errors = []
    for chunk in (None, 5):
        if chunk is not None:
            tile_mlps(model, chunk)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            gradients = step(model, **batch)[1]
        assert gradients[name].dtype == model.dtype
        errors.append((gradients[name] - truth).norm().item())
    assert 0 < errors[1] <= 1.25 * errors[0]


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
        return tiny_model("gpt2", "eager", **{**FAMILIES["gpt2"], "resid_pdrop": 0.1})
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
