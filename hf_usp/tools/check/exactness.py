"""Is what this cluster computes exact? The core against its definition, and a small copy of the user's model.

The law of the tests: in fp64 and fp32 equal up to rounding; in low precision the error against fp32 may be at most
twice what the same computation errs in one process (and a little, where that is nearly nothing).

Shape suffixes: S tokens, H query heads, G kv heads, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from ...attention.functional import usp_attention
from ...batch.shard import shard, shard_tensor
from ...batch.unshard import unshard
from ...distributed.comm import all_reduce_sum
from ...distributed.mesh import UspMesh
from ...models.attention_interface import NAME
from ...models.hooks import attach_hooks
from ...planner.request import read_config, shape_of

ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DOCUMENTS = (5, 1, 3)


def core_error(mesh: UspMesh, device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int]) -> float:
    """Worst error of output and gradients over the allowed one, causal, packed and windowed; above 1: wrong."""
    worst = 0.0
    length = 16 * mesh.size + 5
    for packed, window in ((False, None), (True, None), (False, 7)):
        q, k, v, dout = _random_tensors(length, heads, device)
        positions = None
        if packed:
            parts = [torch.arange(n, device=device) for n in (*DOCUMENTS, length - sum(DOCUMENTS))]
            positions = torch.cat(parts)[None]
        allowed = _allowed(length, positions, window, device)
        exact = _with_gradients(lambda a, b, c: dense(a, b, c, allowed), (q, k, v), dout, torch.float64)  # noqa: B023
        alone = _with_gradients(lambda a, b, c: dense(a, b, c, allowed), (q, k, v), dout, dtype)  # noqa: B023
        batch = {"input_ids": torch.zeros(1, length, dtype=torch.long, device=device)}
        layout = shard(batch if positions is None else {**batch, "position_ids": positions}, mesh)["usp"]
        mine = _with_gradients(
            lambda a, b, c: usp_attention(a, b, c, layout, sliding_window=window),  # noqa: B023
            tuple(shard_tensor(x, layout).contiguous() for x in (q, k, v)),
            shard_tensor(dout, layout, 0.0),
            dtype,
        )
        for ours, theirs, truth in zip(mine, alone, exact, strict=True):
            worst = max(worst, excess(unshard(ours, layout), theirs, truth))
    return worst


def excess(ours: Tensor, alone: Tensor, truth: Tensor) -> float:
    """Our error over the allowed one."""
    size = truth.double().abs().max().item()
    error, usual = ((x.double() - truth.double()).abs().max().item() for x in (ours, alone))
    value = error / (2 * usual + ROUNDING[ours.dtype] * size / 4 + 1e-30)
    return value if value == value else float("inf")


def dense(q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, allowed_SS: Tensor) -> Tensor:
    """Attention from its definition."""
    group = q_BSHD.shape[2] // k_BSGD.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k_BSGD, v_BSGD))
    scores = torch.einsum("bshd,bthd->bhst", q_BSHD, k) * q_BSHD.shape[-1] ** -0.5
    weights = scores.masked_fill(~allowed_SS, float("-inf")).softmax(-1)
    return torch.einsum("bhst,bthd->bshd", weights, v)


def _random_tensors(length: int, heads: tuple[int, int, int], device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, kv, width = heads
    return [torch.randn(1, length, h, width, generator=generator).to(device) for h in (query, kv, kv, query)]


def _allowed(length: int, positions: Tensor | None, window: int | None, device: torch.device) -> Tensor:
    i = torch.arange(length, device=device)
    distance = i[:, None] - i
    allowed = (distance >= 0) & (distance < (window or length))
    if positions is not None:
        document = (positions[0].diff(prepend=positions[0, :1] - 1) != 1).cumsum(0)
        allowed &= document[:, None] == document
    return allowed


def _with_gradients(
    act: Callable[..., Tensor], inputs: tuple[Tensor, ...], dout: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
    out = act(*leaves)
    grads = torch.autograd.grad(out, leaves, dout.to(dtype))
    return [out.detach(), *grads]


def small_config(name: str) -> PretrainedConfig:
    """The config of a model with few and narrow layers: every kind of layer, its heads and their width as they are.

    Raises `UspConfigError` where it cannot be found without the network.
    """
    config = read_config(name)
    shape_of(config)  # refuses sizes that no model has
    return shrink(config)


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    """A copy with at most 512 tokens in the vocabulary and just enough layers."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    types = getattr(text, "layer_types", None)
    layers = min(text.num_hidden_layers, 2)
    if types:
        layers = max(layers, max(types.index(mask_spec) for mask_spec in set(types)) + 1)
        text.layer_types = types[:layers]
    text.num_hidden_layers = layers
    narrow = {"vocab_size": 512, "intermediate_size": 256, "moe_intermediate_size": 64, "num_experts": 8}
    narrow |= {"num_local_experts": 8, "n_routed_experts": 8}
    if "head_dim" in text.to_dict() and text.to_dict()["head_dim"]:
        narrow["hidden_size"] = 256
    for name, most in narrow.items():
        value = getattr(text, name, None)
        if isinstance(value, int) and value > most:
            setattr(text, name, most)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(text, name, None)
        if isinstance(value, list) or (isinstance(value, int) and value >= text.vocab_size):
            setattr(text, name, 0)
    return small


def model_error(config: PretrainedConfig, mesh: UspMesh, device: torch.device, dtype: torch.dtype) -> float:
    """Worst error of loss and gradients of a model over what is allowed. Raises `UspError` where it is refused."""
    text = config.get_text_config()
    length = 8 * mesh.size + 3
    ids = torch.randint(text.vocab_size, (1, length), generator=torch.Generator().manual_seed(1)).to(device)
    batch = {"input_ids": ids, "labels": ids.clone()}

    def step(attention: str, weights: torch.dtype, over: UspMesh | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention)
        model = model.to(device=device, dtype=weights)
        if over is not None and over.size > 1:  # a single rank has nothing to shard: "usp" as one process has it
            attach_hooks(model, over)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if over is not None and over.group is not None:
            grads = {name: all_reduce_sum(grad, over.group) / over.size for name, grad in grads.items()}
        return {"loss": loss.detach(), **grads}

    whole = "sdpa"
    truth = step(whole, torch.float32, None)
    alone = truth if dtype == torch.float32 else step(whole, dtype, None)
    mine = step(NAME, dtype, mesh)
    if mine.keys() != truth.keys():
        return float("inf")
    return max(excess(mine[name].to(dtype), alone[name], truth[name]) for name in truth)
