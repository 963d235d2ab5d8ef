"""The self-check passes what is exact, names what is not, and leaves no trace."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hf_usp

from ..harness import fresh_accelerate, prepared
from ..ranks import Ranks
from ..tiny import HYBRID, batch_of, tiny_model
from .spoiled import spoil


def verdict(how: str, dtype: torch.dtype, check: bool) -> str:
    from accelerate import Accelerator

    fresh_accelerate()
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
    [
        ("neighbour", "layers.0.mlp.up_proj"),
        ("pool", "layers.0.mlp.up_proj"),
        ("positions", "rotary_emb"),
        ("overwrites", "embed_tokens.weight in its forward"),
    ],
)
def test_what_is_not_exact_is_refused_and_named(four_ranks: Ranks, how: str, module: str, dtype: torch.dtype) -> None:
    for message in four_ranks.run(verdict, how, dtype, True, timeout=40):
        assert f"model.{module}" in message, message


def test_it_can_be_switched_off(four_ranks: Ranks) -> None:
    assert four_ranks.run(verdict, "neighbour", torch.float32, False) == ["passed"] * 4


class Repacks(nn.Linear):
    """As 4-bit layers on some CPUs: in evaluation without gradients the weight is packed anew, one way."""

    def pack(self) -> None:
        self.weight.data = self.weight.t().contiguous()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training and not x.requires_grad and not self.state.packed:
            self.pack()
            self.state.packed = True
        return nn.functional.linear(x, self.weight.t() if self.state.packed else self.weight)


class Replaces(Repacks):
    def pack(self) -> None:
        self.weight = nn.Parameter(self.weight.t().contiguous())


def traces() -> list[str]:
    """Objects that one checked forward leaves behind, beyond those that an unchecked one does."""
    left = []
    model = prepared("qwen2")
    inner = model.module
    inner.train()
    inner.model.layers[1].eval()
    mlp = inner.model.layers[0].mlp
    packing = {mlp.up_proj: Repacks, mlp.down_proj: Replaces}
    for layer, kind in packing.items():
        layer.__class__, layer.state = kind, SimpleNamespace(packed=False)
    parameters = {name: (p, p.data_ptr(), p.clone()) for name, p in inner.named_parameters()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in inner.modules())
    buffers = {name: b.clone() for name, b in inner.named_buffers()}
    torch.manual_seed(5)
    expected, python, numpy = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    model(**batch_of("plain"))
    same = random.getstate() == python and np.random.get_state()[1].tobytes() == numpy
    if not torch.equal(torch.random.get_rng_state(), expected) or not same:
        left.append("random state")
    if not inner.training or inner.model.layers[1].training:
        left.append("training flags")
    if sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in inner.modules()) != hooks:
        left.append("hooks")
    if any(not torch.equal(b, buffers[name]) for name, b in inner.named_buffers()):
        left.append("buffers")
    for name, p in inner.named_parameters():
        same, place, value = parameters[name]
        if p is not same or p.data_ptr() != place or not torch.equal(p, value):
            left.append(name)
    if any(layer.state.packed for layer in packing):
        left.append("the state beside a parameter")
    if any(p.grad is not None for p in inner.parameters()):
        left.append("gradients")
    return left


def test_it_leaves_no_trace(four_ranks: Ranks) -> None:
    assert four_ranks.run(traces) == [[]] * 4


class Allocations(TorchDispatchMode):
    """The largest storage, in bytes, that operations make and that is none of a model's own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.own:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result


def cost(family: str, training: bool, changes: dict[str, Any]) -> dict[str, Any]:
    """Tokens of every call of the model in its first two forwards, and the largest tensor of the check itself."""
    from hf_usp.models.selfcheck.check import measure
    from hf_usp.models.selfcheck.training import training_check

    from .verdict import attach_to

    model = tiny_model(family, **changes).train(training)
    hooks = attach_to(model, (2, 2), True)
    calls, forward = [], model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["input_ids"].numel())
        return forward(*args, **kwargs)

    model.forward = counted
    batch = batch_of("plain")
    model(**batch)
    first = list(calls)
    model(**batch)
    with Allocations(model) as seen, hooks.entry.closed():
        measure(model, hooks.traits, hooks.mesh, hooks.options, torch.device("cpu"))
        training_check(model, hooks.mesh, hooks.options, torch.device("cpu"))
    return {"first": first, "second": calls[len(first) : len(first) + 1], "largest": seen.largest}


@pytest.mark.parametrize("family", ["llama", "qwen3_5_text"])
def test_it_costs_a_few_forwards_of_a_few_tokens(four_ranks: Ranks, family: str) -> None:
    """Once; its tensors are as large as its few tokens, whatever the size of the model."""
    changes = {"vocab_size": 6000, "hidden_size": 64} | (HYBRID if family == "qwen3_5_text" else {})
    for training in (True, False):
        for mine in four_ranks.run(cost, family, training, changes):
            check = mine["first"][:-1]
            assert 0 < len(check) <= (10 if training else 8) and max(check) <= 8, mine
            assert mine["second"] == mine["first"][-1:]
            assert mine["largest"] <= 8 * 6000 * 4


def autocast_verdict(factor: float, training: bool) -> str:
    """A loop of one's own under autocast, with a kernel that knows bf16 alone; outputs come out too large."""
    from accelerate import Accelerator

    from hf_usp.kernels.cpu_flash import CpuFlashKernel
    from hf_usp.kernels.registry import KERNELS

    class Bf16Kernel(CpuFlashKernel):
        name = "bf16_alone"

        def why_not(self, request: Any) -> str | None:
            return None if request.dtype == torch.bfloat16 else f"not in {request.dtype}"

        def forward(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
            out, lse = super().forward(*args)
            return out * factor, lse

    fresh_accelerate()
    KERNELS[Bf16Kernel.name] = Bf16Kernel()
    try:
        config = hf_usp.UspParallelismConfig(cp_size=4, ulysses_degree=2, kernel=Bf16Kernel.name)
        model = Accelerator(cpu=True, parallelism_config=config).prepare(tiny_model("llama").train(training))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**batch_of("plain"))
        return "passed"
    except hf_usp.UspModelError as error:
        return str(error)
    finally:
        del KERNELS[Bf16Kernel.name]


def test_under_autocast_the_kernel_of_the_run_is_checked_too(four_ranks: Ranks) -> None:
    assert four_ranks.run(autocast_verdict, 1.0, True) == ["passed"] * 4
    for message in four_ranks.run(autocast_verdict, 1.5, False):
        assert "model.layers.0.self_attn" in message, message


def family_verdict(family: str) -> str:
    try:
        prepared(family)(**batch_of("plain"))
    except hf_usp.UspModelError as error:
        return str(error)
    return "passed"


def test_a_family_with_attention_code_of_its_own_is_refused(four_ranks: Ranks) -> None:
    for message in four_ranks.run(family_verdict, "bloom", timeout=40):
        assert message.startswith("usp: BloomForCausalLM has attention code of its own"), message


def test_it_runs_where_the_batch_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 may keep parameters on another device than the one it computes on."""
    from hf_usp.models import hooks as prepare

    class SeenError(Exception):
        pass

    def seen(model: Any, traits: Any, mesh: Any, options: Any, device: torch.device, verdict: bool) -> Any:
        raise SeenError(device.type)

    monkeypatch.setattr(prepare, "measure", seen)
    with torch.device("meta"):
        model = tiny_model("llama", "usp")
    prepare.attach_hooks(model, hf_usp.UspMesh.build(ring_degree=1, ulysses_degree=1))
    for batch in (batch_of("plain"), {"inputs_embeds": torch.zeros(1, 5, 8)}):
        model_hooks = prepare.get_hooks(model)
        assert model_hooks is not None
        model_hooks.failed = None
        with pytest.raises(SeenError, match="cpu"):
            model(**batch)
