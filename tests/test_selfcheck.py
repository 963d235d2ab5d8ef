"""The self-check passes what is exact, names what is not, and leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hf_usp

from .ranks import Ranks
from .test_bad_input import prepared
from .tiny import batch_of, tiny_model


class PeeksAtTheNeighbour(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + torch.nn.functional.pad(x, (0, 0, 1, -1)))


class MeanPools(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + x.mean(1, keepdim=True))


class CountsPositions(nn.Module):
    """A rotary embedding that ignores the position_ids it gets."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return self.rotary(x, torch.arange(x.shape[1])[None].expand_as(position_ids))


def spoil(model: Any, how: str) -> Any:
    old = model.model.layers[0].mlp.up_proj
    if how == "positions":
        model.model.rotary_emb = CountsPositions(model.model.rotary_emb)
    else:
        new = {"neighbour": PeeksAtTheNeighbour, "pool": MeanPools}[how](old.in_features, old.out_features, bias=False)
        new.weight = old.weight
        model.model.layers[0].mlp.up_proj = new
    return model


def verdict(how: str, dtype: torch.dtype, check: bool) -> str:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    config = hf_usp.UspParallelismConfig(cp_size=4, ulysses_degree=2, self_check=check)
    model = spoil(tiny_model("llama", dtype=dtype), how)
    model = Accelerator(cpu=True, parallelism_config=config).prepare(model)
    try:
        model(**batch_of("plain"))
    except hf_usp.UspModelError as error:
        return str(error)
    return "passed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("how", "module"),
    [("neighbour", "layers.0.mlp.up_proj"), ("pool", "layers.0.mlp.up_proj"), ("positions", "rotary_emb")],
)
def test_what_is_not_exact_is_refused_and_named(four_ranks: Ranks, how: str, module: str, dtype: torch.dtype) -> None:
    for message in four_ranks.run(verdict, how, dtype, True, timeout=40):
        assert f"model.{module}" in message, message


def test_it_can_be_switched_off(four_ranks: Ranks) -> None:
    assert four_ranks.run(verdict, "neighbour", torch.float32, False) == ["passed"] * 4


def traces() -> list[str]:
    """What one checked forward leaves behind, beyond what an unchecked one does."""
    left = []
    model = prepared("qwen2")
    inner = model.module
    inner.train()
    inner.model.layers[1].eval()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in inner.modules())
    buffers = {name: b.clone() for name, b in inner.named_buffers()}
    torch.manual_seed(5)
    expected = torch.random.get_rng_state()
    model(**batch_of("plain"))
    if not torch.equal(torch.random.get_rng_state(), expected):
        left.append("random state")
    if not inner.training or inner.model.layers[1].training:
        left.append("training flags")
    if sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in inner.modules()) != hooks:
        left.append("hooks")
    if any(not torch.equal(b, buffers[name]) for name, b in inner.named_buffers()):
        left.append("buffers")
    if any(p.grad is not None for p in inner.parameters()):
        left.append("gradients")
    return left


def test_it_leaves_no_trace(four_ranks: Ranks) -> None:
    assert four_ranks.run(traces) == [[]] * 4


def family_verdict(family: str, changes: dict[str, Any]) -> str:
    try:
        prepared(family, **changes)(**batch_of("plain"))
    except hf_usp.UspModelError as error:
        return str(error)
    return "passed"


@pytest.mark.parametrize("family", ["minimax", "recurrent_gemma", "bloom"])
def test_families_beyond_us_are_refused(four_ranks: Ranks, family: str) -> None:
    changes = {"minimax": {"layer_types": ["linear_attention", "full_attention"]}}.get(family, {})
    for message in four_ranks.run(family_verdict, family, changes, timeout=40):
        assert message.startswith("usp: "), message
