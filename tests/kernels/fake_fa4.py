"""Stand-ins for FlashAttention 4: its two functions with the recorded signatures of releases, computed by `stand_in`.

`release(version)` makes the modules `flash_attn` (a folder without a file), `flash_attn.cute` and its `interface`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from . import stand_in
from .fake_flash_attn import signature

FORWARD = (
    "q k v qv=None cu_seqlens_q=None cu_seqlens_k=None seqused_q=None seqused_k=None max_seqlen_q=None "
    "max_seqlen_k=None min_seqlen_k=None page_table=None softmax_scale=None causal=False softcap=None "
    "window_size_left=None window_size_right=None learnable_sink=None tile_mn=None mma_pv_is_rs=None "
    "intra_wg_overlap=None num_threads=384 num_splits=1 pack_gqa=None _arch=None score_mod=None mask_mod=None "
    "block_sparse_tensors=None return_lse=False out=None lse=None aux_tensors=None aux_scalars=None q_descale=None "
    "k_descale=None v_descale=None gather_kv_indices=None"
)
BACKWARD = (
    "q k v out dout lse softmax_scale=None causal=False softcap=0.0 window_size_left=None window_size_right=None "
    "m_block_size=64 n_block_size=128 num_threads=256 pack_gqa=False num_stages_Q=2 num_stages_dO=2 SdP_swapAB=False "
    "dKV_swapAB=False dQ_swapAB=False AtomLayoutMSdP=2 AtomLayoutNdKV=2 AtomLayoutMdQ=2 V_in_regs=False "
    "cu_seqlens_q=None cu_seqlens_k=None seqused_q=None seqused_k=None max_seqlen_q=None max_seqlen_k=None "
    "deterministic=False dq=None dk=None dv=None score_mod=None score_mod_bwd=None mask_mod=None aux_tensors=None "
    "aux_scalars=None block_sparse_tensors=None dlse=None"
)
B30 = " scheduler_metadata=None seqlen_k_per_split=None disable_scheduler_metadata=False"
# The file of flash-attn 2.8.3 in the same folder: no variable lengths in the backward.
OLD_FORWARD = (
    "q k v cu_seqlens_q=None cu_seqlens_k=None seqused_q=None seqused_k=None page_table=None softmax_scale=None "
    "causal=False softcap=None window_size_left=None window_size_right=None learnable_sink=None m_block_size=128 "
    "n_block_size=128 num_threads=384 pack_gqa=None _compute_capability=None"
)
OLD_BACKWARD = (
    "q k v out dout lse softmax_scale=None causal=False softcap=0.0 m_block_size=64 n_block_size=128 num_threads=256 "
    "num_stages_Q=2 num_stages_dO=2 SdP_swapAB=False dKV_swapAB=False dQ_swapAB=False AtomLayoutMSdP=2 "
    "AtomLayoutNdKV=2 AtomLayoutMdQ=2 V_in_regs=False"
)
# (arguments of the forward, of the backward, number of results of the forward)
RELEASES = {
    "4.0.0b18": (FORWARD, BACKWARD, 2),
    "4.0.0b19": (FORWARD, BACKWARD, 4),
    "4.0.0b30": (FORWARD + B30, f"{BACKWARD} learnable_sink=None", 4),
    "4.0.0b36": (f"{FORWARD}{B30} gather_bwd_recompute_p=False", f"{BACKWARD} learnable_sink=None", 5),
    "2.8.3": (OLD_FORWARD, OLD_BACKWARD, 2),
}


def release(version: str, major: int = 9) -> dict[str, ModuleType]:
    forward, backward = functions(version, major)
    modules = {name: ModuleType(name) for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface")}
    modules["flash_attn"].__path__ = modules["flash_attn.cute"].__path__ = []
    interface: Any = modules["flash_attn.cute.interface"]
    interface._flash_attn_fwd, interface._flash_attn_bwd = forward, backward
    return modules


def functions(version: str, major: int = 9) -> tuple[Callable[..., Any], Callable[..., Any]]:
    names, names_backward, results = RELEASES[version]
    takes, takes_backward = signature(names), signature(names_backward)

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        given = _bind(takes, args, kwargs)
        assert given["return_lse"] is True, "else there is none"
        out, lse = stand_in.forward(_call(given, major))
        return (out, lse, None, None, None)[:results]

    def backward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        given = _bind(takes_backward, args, kwargs)
        grads = stand_in.backward(_call(given, major), given["dout"], given["out"], given["lse"])
        for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
            if given[name] is not None:  # torch gives none
                given[name].copy_(grad)
        return grads

    forward.__signature__, backward.__signature__ = takes, takes_backward  # type: ignore[attr-defined]
    return forward, backward


def _bind(takes: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = takes.bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _call(given: dict[str, Any], major: int) -> stand_in.Varlen:
    longest = (given["max_seqlen_q"], given["max_seqlen_k"])
    if longest == (None, None):  # torch gives none to the backward
        longest = (1 << 30, 1 << 30)
    return stand_in.Varlen(
        *(given[name] for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")),
        *longest,
        scale=given["softmax_scale"],
        causal=given["causal"],
        left=given["window_size_left"],
        right=given["window_size_right"],
        softcap=given["softcap"] or 0.0,
        family="fa4",
        major=major,
    )
