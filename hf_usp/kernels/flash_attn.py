"""The flash-attn package (FlashAttention 2, versions 2.7 and 2.8), where it is installed.

Shape suffixes: T packed query rows, K packed key rows, H query heads, G kv heads, D key width, E value width.

Its low-level variable-length functions, called by keyword only. The rules are those of `varlen`; softcap is native.
FlashAttention 3 and 4 are other packages with other calls. The package is imported when a call is to be computed on a
CUDA device, never before.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..compat import FLASH_ATTN, import_flash_attn
from ..errors import UspKernelError
from .base import Segments, Softmax
from .varlen import bounds, operands, why_not

INSTALL = "pip install flash-attn --no-build-isolation"


class FlashAttnKernel:
    name = "flash_attn"

    def why_not(self, device: torch.device, dtype: torch.dtype, head_dim: int, softmax: Softmax) -> str | None:
        if (reason := _missing()) is not None:
            return reason
        if (reason := why_not(device, dtype, head_dim)) is not None:
            return reason
        found = _functions()
        return found if isinstance(found, str) else None

    def forward(
        self, q_THD: Tensor, k_KGD: Tensor, v_KGE: Tensor, segments: Segments, softmax: Softmax
    ) -> tuple[Tensor, Tensor]:
        q, k, v = operands(q_THD, k_KGD, v_KGE)
        forward, _ = _require()
        out, lse_HT, *_ = forward(q=q, k=k, v=v, return_softmax=False, **_common(segments, softmax))
        return out[..., : v_KGE.shape[2]], lse_HT

    def backward(
        self,
        dout_THE: Tensor,
        q_THD: Tensor,
        k_KGD: Tensor,
        v_KGE: Tensor,
        out_THE: Tensor,
        lse_HT: Tensor,
        segments: Segments,
        softmax: Softmax,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dout, q, k, v, out = operands(dout_THE, q_THD, k_KGD, v_KGE, out_THE)
        # The gradients are written into tensors of ours.
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        _, backward = _require()
        backward(
            dout=dout,
            q=q,
            k=k,
            v=v,
            out=out,
            softmax_lse=lse_HT.contiguous(),
            dq=dq,
            dk=dk,
            dv=dv,
            **_common(segments, softmax),
            # The package's default is False; torch's own switch is honoured as torch's own operator does.
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        head_dim = q_THD.shape[2]
        return dq[..., :head_dim], dk[..., :head_dim], dv[..., : v_KGE.shape[2]]


def _common(segments: Segments, softmax: Softmax) -> dict[str, Any]:
    """The arguments that forward and backward share."""
    call = bounds(segments)
    return {
        "cu_seqlens_q": segments.cu_seqlens_q,
        "cu_seqlens_k": segments.cu_seqlens_k,
        "max_seqlen_q": call.max_seqlen_q,
        "max_seqlen_k": call.max_seqlen_k,
        "dropout_p": 0.0,
        "softmax_scale": softmax.scale,
        "causal": call.causal,
        "window_size_left": call.left,
        "window_size_right": call.right,
        "softcap": softmax.softcap or 0.0,
        "alibi_slopes": None,
    }


def _missing() -> str | None:
    """The package that is missing and how to install it, without importing anything."""
    if importlib.util.find_spec("flash_attn") is None:
        return f"the package flash-attn is not installed: {INSTALL}"
    return None


def _functions() -> tuple[Callable[..., Any], Callable[..., Any]] | str:
    """The package's forward and backward, or the reason why they cannot be used."""
    try:
        version, forward, backward = import_flash_attn()
    except (ImportError, OSError, RuntimeError) as error:
        # A build for another torch fails here, and so does FlashAttention 4 alone, which shares the package's name.
        return (
            f"flash-attn is installed but does not import ({error}): "
            f"build it for this torch with {INSTALL} --force-reinstall --no-deps"
        )
    if not FLASH_ATTN[0] <= tuple(int(part) for part in version.split(".")[:2]) < FLASH_ATTN[1]:
        return f"flash-attn {version} is installed, versions 2.7 and 2.8 are supported: {INSTALL}"
    return forward, backward


def _require() -> tuple[Callable[..., Any], Callable[..., Any]]:
    found = _functions()
    if isinstance(found, str):
        raise UspKernelError("kernel='flash_attn'", rule=found, remedy="leave kernel=None to let hf_usp choose")
    return found
