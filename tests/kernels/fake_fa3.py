"""Stand-ins for FlashAttention 3: its operators, registered on the CPU with their published schemas.

So the dispatcher itself checks every argument. `MAIN` is the schema of hopper/flash_api.cpp since arguments have
defaults, `OLDER` that of releases before, whose arguments may be None but have to be given.
"""

from __future__ import annotations

import re
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from . import stand_in

FORWARD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None, "
    "Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False, "
    "Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) "
    "-> (Tensor(out!), Tensor, Tensor, Tensor)"
)
BACKWARD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None, "
    "Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
    "float softcap=0.0, bool deterministic=False, int sm_margin=0) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# Arguments without a default in earlier releases.
OLDER = (r"(Tensor(?:\(\w+!\))?\? (?!scheduler)\w+|int\? \w+|float\? \w+|bool is_causal)=(?:None|False)", r"\1")
_LIBRARIES: list[Library] = []


def operators(namespace: str, older: bool = False) -> Any:
    """The namespace of the operators, registered once a process."""
    if not hasattr(getattr(torch.ops, namespace), "fwd"):
        library = Library(namespace, "DEF")
        for schema, function in ((FORWARD, _forward), (BACKWARD, _backward)):
            library.define(re.sub(*OLDER, schema) if older else schema)
            library.impl(schema.partition("(")[0], function, "CPU")
        _LIBRARIES.append(library)
    return getattr(torch.ops, namespace)


def hub(namespace: str = "_flash_attn3_1f2e3d") -> ModuleType:
    """The package `kernels` with the kernel of the Hub loaded; its operators have a namespace of their own."""
    module = ModuleType("kernels")
    info = SimpleNamespace(repo_id="kernels-community/flash-attn3")
    loaded = SimpleNamespace(repo_info=info, module=SimpleNamespace(ops=operators(namespace)))
    module.get_loaded_kernels = lambda: [loaded]  # type: ignore[attr-defined]
    return module


def _forward(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = _named(FORWARD, 3, others)
    assert given.get("num_splits") == 1, "the heuristic of 0 keeps partial outputs in fp32"
    out, lse = stand_in.forward(_call(q, k, v, given))
    return out, lse, torch.empty(0), torch.empty(0)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    given = _named(BACKWARD, 6, others)
    wide = max(q.shape[2], v.shape[2]) > 192
    assert not (given.get("deterministic") and wide), "deterministic backward is not supported for this head size"
    for name, grad in zip(("dq", "dk", "dv"), stand_in.backward(_call(q, k, v, given), dout, out, lse), strict=True):
        assert given[name].shape == grad.shape and given[name].is_contiguous(), f"{name} is written in place"
        given[name].copy_(grad)
    return tuple(torch.empty(0) for _ in range(5))


def _named(schema: str, start: int, values: tuple[Any, ...]) -> dict[str, Any]:
    """Arguments by name; the dispatcher leaves out the last ones that have their default."""
    words = schema.partition("(")[2].partition(") ->")[0].split(", ")[start:]
    return dict(zip((word.split()[-1].partition("=")[0] for word in words), values, strict=False))


def _call(q: Tensor, k: Tensor, v: Tensor, given: dict[str, Any]) -> stand_in.Varlen:
    # `num_splits`, `attention_chunk` and the like have other values only where somebody asks for them.
    unused = {"k_new", "v_new", "q_v", "out", "cu_seqlens_k_new", "seqused_q", "seqused_k", "page_table", "pack_gqa"}
    assert all(given.get(name) is None for name in unused) and not given.get("attention_chunk")
    return stand_in.Varlen(
        *(q, k, v, given["cu_seqlens_q"], given["cu_seqlens_k"], given["max_seqlen_q"], given["max_seqlen_k"]),
        scale=given["softmax_scale"],
        causal=given.get("is_causal", False),
        left=given.get("window_size_left", -1),
        right=given.get("window_size_right", -1),
        softcap=given.get("softcap", 0.0),
        family="fa3",
    )
