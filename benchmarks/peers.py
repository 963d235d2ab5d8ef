"""Other libraries' sequence-parallel attention, each as it runs on CPU processes, behind one call.

    python -m pip install --no-deps --target build/peers yunchang==0.6.4 axolotl-ringmaster==0.2.7 \\
        ring-flash-attn==0.1.8 ring-attention-pytorch==0.5.20 einops beartype jaxtyping hjson msgpack ninja py-cpuinfo
    DS_BUILD_OPS=0 PYTHONPATH=build/peers python -m pip install --no-deps --no-build-isolation --target build/peers \\
        wheel deepspeed==0.19.8

None is a dependency of hf_usp or of its tests; what is missing is reported as not installed. Where a peer asks for
flash-attn it gets `flash_stand_in`; where it computes on CPU tensors only by formulas, the one check that says so is
lifted, so that its schedule and not its fallback is measured. Both are said in `Contender.note`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import flash_stand_in
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import hf_usp
from hf_usp.batch.layout import make_layout
from hf_usp.batch.shard import shard_tensor
from hf_usp.sharding.masks import Documents

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """shard: rows of this rank of a full tensor [B, S, heads, D]; attend: local q, k, v -> local out [B, s, H, D]."""

    name: str
    ulysses: int
    ring: int
    shard: Callable[[Tensor], Tensor]
    attend: Attend
    note: str = ""


def contiguous(full: Tensor) -> Tensor:
    """The r-th of W equal slices."""
    return full.chunk(dist.get_world_size(), 1)[dist.get_rank()].contiguous()


def zigzag(ulysses: int) -> Callable[[Tensor], Tensor]:
    """Chunks i and 2R - 1 - i to ring rank i, cut evenly among its ulysses ranks."""
    rank, ring = dist.get_rank() // ulysses, dist.get_world_size() // ulysses

    def shard(full: Tensor) -> Tensor:
        chunks = full.chunk(2 * ring, 1)
        mine = torch.cat([chunks[rank], chunks[2 * ring - 1 - rank]], 1)
        return mine.chunk(ulysses, 1)[dist.get_rank() % ulysses].contiguous()

    return shard


def ours(tokens: int, ulysses: int) -> Contender:
    """This library."""
    ring = dist.get_world_size() // ulysses
    mesh = hf_usp.UspMesh.build(ring_degree=ring, ulysses_degree=ulysses)
    layouts: dict[int, hf_usp.SequenceLayout] = {}

    def find_layout(length: int) -> hf_usp.SequenceLayout:
        if length not in layouts:
            layouts[length] = make_layout(Documents.from_bounds([0, length]), 1, length, mesh, kernel="cpu_flash")
        return layouts[length]

    find_layout(tokens)
    return Contender(
        "hf_usp",
        ulysses,
        ring,
        lambda full: shard_tensor(full, find_layout(full.shape[1])).contiguous(),
        lambda q, k, v: hf_usp.usp_attention(q, k, v, find_layout(q.shape[1] * ring * ulysses)),
    )


def torch_ring(rotate: str) -> Contender:
    """torch's own context parallel: its ring template with the CPU operator; `context_parallel()` has no CPU path."""
    from torch.distributed.tensor.experimental._context_parallel import _attention as template

    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    group: Any = dist.group.WORLD

    class Ring(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            template.set_rotate_method(rotate)
            template._cp_options.enable_load_balance = True
            out, lse, *_ = template._templated_ring_attention(group, 2, forward, q, k, v, is_causal=True)
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            q, k, v, out, lse = ctx.saved_tensors
            return template._templated_ring_attention_backward(
                group, 2, backward, grads[0], "grad_out", q, k, v, out, lse, True, dropout_p=0.0
            )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return Ring.apply(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    return Contender(
        f"torch context parallel, {rotate}", 1, dist.get_world_size(), zigzag(1), attend, "its ring template"
    )


def yunchang(ulysses: int) -> Contender:
    """yunchang (the USP paper's code), zigzag."""
    flash_stand_in.install()
    from yunchang import LongContextAttention, UlyssesAttention, set_seq_parallel_pg
    from yunchang.kernels import AttnType

    world = dist.get_world_size()
    set_seq_parallel_pg(ulysses, world // ulysses, dist.get_rank(), world)
    kind = AttnType.from_string("fa")
    if ulysses == world:  # its ring of one rank sends to itself, which gloo refuses
        layer = UlyssesAttention(dist.group.WORLD, attn_type=kind)
    else:
        layer = LongContextAttention(ring_impl_type="zigzag", attn_type=kind)
    return Contender(
        "yunchang",
        ulysses,
        world // ulysses,
        zigzag(ulysses) if ulysses < world else contiguous,
        lambda q, k, v: layer(q, k, v, causal=True),
        "flash-attn stand-in",
    )


def ring_flash_attn() -> Contender:
    """zhuzilin's ring-flash-attention, zigzag."""
    flash_stand_in.install()
    # Its adapter for Transformers needs an older one; only that part is left out.
    stub: Any = ModuleType("ring_flash_attn.adapters")
    stub.substitute_hf_flash_attn = stub.update_ring_flash_attn_params = None
    sys.modules["ring_flash_attn.adapters"] = stub
    from ring_flash_attn import zigzag_ring_flash_attn_func

    return Contender(
        "ring-flash-attn",
        1,
        dist.get_world_size(),
        zigzag(1),
        lambda q, k, v: zigzag_ring_flash_attn_func(q, k, v, causal=True, group=dist.group.WORLD),
        "flash-attn stand-in",
    )


def ringmaster(ulysses: int, schedule: str) -> Contender:
    """axolotl-ringmaster; its zigzag exists as a pure ring, with ulysses its shards are contiguous."""
    flash_stand_in.install()
    from ringmaster.comm import seq_all_to_all

    p2p, zig = (_on_cpu(f"ringmaster.ring.{name}") for name in ("p2p_attn", "zigzag"))
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world // ulysses, ulysses), mesh_dim_names=("ring", "ulysses"))
    along_ulysses, along_ring = mesh["ulysses"].get_group(), mesh["ring"].get_group()

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if schedule == "zigzag":
            return zig.zigzag_ring_attention(q, k, v, group=along_ring, scaling=None)
        if ulysses == world:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return flash_stand_in.flash_attn_func(q, k, v, causal=True)
        return p2p.ring_p2p_attention(q, k, v, group=along_ring, causal=True, scaling=None)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (seq_all_to_all(t.transpose(1, 2), scatter_dim=1, gather_dim=2, group=along_ulysses) for t in (q, k, v))
        return seq_all_to_all(core(*heads), scatter_dim=1, gather_dim=2, group=along_ulysses)

    shard = zigzag(1) if schedule == "zigzag" else contiguous
    note = "its CUDA schedule on CPU tensors, flash-attn stand-in"
    return Contender(f"ringmaster, {schedule}", ulysses, world // ulysses, shard, attend, note)


def _on_cpu(name: str) -> Any:
    """A module of ringmaster that takes CPU tensors for CUDA ones, with the stand-in as its kernel."""
    if name in sys.modules and hasattr(sys.modules[name], "taken_for_cuda"):
        return sys.modules[name]
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with open(spec.origin, encoding="utf-8") as file:
        exec(compile(file.read().replace("q.is_cuda", "True"), spec.origin, "exec"), module.__dict__)
    changes = {
        "taken_for_cuda": True,
        "_flash_ops": lambda *_: (flash_stand_in.flash_forward, flash_stand_in.flash_backward),
    }
    vars(module).update(changes)
    return module


def deepspeed() -> Contender:
    """DeepSpeed's Ulysses (ALST), which is Accelerate's `sp_backend="deepspeed"`."""
    import logging

    os.environ.update(DS_ACCELERATOR="cpu", DS_SKIP_CUDA_CHECK="1")
    logging.disable(logging.WARNING)
    import deepspeed.comm
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    deepspeed.comm.init_distributed(dist_backend="gloo", verbose=False)
    attention = torch.nn.functional.scaled_dot_product_attention

    def core(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1]).transpose(1, 2), None

    class Caller(torch.nn.Module):
        is_causal, layer_idx = True, 0

    caller = Caller()
    made: dict[int, Any] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, length, heads, width = q.shape
        if not made:
            made[0] = UlyssesSPAttentionHF(
                attn=core,
                batch_size=batch,
                attn_head_count=heads,
                attn_head_size=width,
                kv_head_count=k.shape[2],
                num_hidden_layers=1,
                process_group=dist.group.WORLD,
                seq_length_is_variable=True,
            )
        places = torch.arange(length)[None] + dist.get_rank() * length
        out = made[0](caller, *(t.transpose(1, 2) for t in (q, k, v)), None, position_ids=places)[0]
        return out.view(batch, length, heads, width)

    return Contender("DeepSpeed Ulysses", dist.get_world_size(), 1, contiguous, attend, "sdpa core")


def lucidrains() -> Contender:
    """lucidrains' ring-attention-pytorch, striped; its blocks are formulas in torch."""
    from ring_attention_pytorch import ring_flash_attn as ring

    world = dist.get_world_size()

    def shard(full: Tensor) -> Tensor:
        return full[:, dist.get_rank() :: world].contiguous()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Its query head i reads kv head i % G; everywhere else it is i // (H // G).
        groups = q.shape[2] // k.shape[2]
        rows = (t.float() for t in (q.unflatten(2, (-1, groups)).transpose(2, 3).flatten(2, 3), k, v))
        out = ring(*rows, None, True, min(512, q.shape[1]), True, True, None, world)
        return out.unflatten(2, (groups, -1)).transpose(2, 3).flatten(2, 3).to(q.dtype)

    return Contender("lucidrains ring", 1, world, shard, attend, "blocks in plain torch, in fp32 alone")


def contenders(tokens: int) -> tuple[list[Contender], dict[str, str]]:
    """Everything that runs here on this many processes; and of what does not, name and reason."""
    world = dist.get_world_size()
    degrees = list(dict.fromkeys((world, *((2,) if world > 2 else ()), 1)))
    makers: list[tuple[str, Callable[[], Contender]]] = [("hf_usp", partial(ours, tokens, u)) for u in degrees]
    makers += [("torch context parallel", partial(torch_ring, rotate)) for rotate in ("allgather", "alltoall")]
    makers += [("yunchang", partial(yunchang, u)) for u in degrees]
    makers += [("ring-flash-attn", ring_flash_attn), ("ringmaster", partial(ringmaster, 1, "zigzag"))]
    makers += [("ringmaster", partial(ringmaster, u, "p2p")) for u in degrees]
    makers += [("DeepSpeed Ulysses", deepspeed), ("lucidrains ring", lucidrains)]
    found: list[Contender] = []
    missing: dict[str, str] = {}
    for name, make in makers:
        try:
            found.append(make())
        except ImportError as error:
            missing[name] = f"not installed here ({error}); the commands stand in benchmarks/peers.py"
    return found, missing
