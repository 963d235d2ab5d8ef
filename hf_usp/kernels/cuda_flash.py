"""torch's own FlashAttention 2 for CUDA: what torch carries, nothing to install.

Shape suffixes: T packed query rows, K packed key rows, H query heads, G kv heads, D key width, E value width.

The variable-length operators of `torch.nn.attention.varlen`, called directly because only they take a backward with
someone else's output and log-sum-exp. Only arguments of both torch 2.11 and 2.13 are passed. The rules are those of
`varlen`; these operators have no softcap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..compat import cuda_flash_operators, installed_version
from .base import Segments, Softmax
from .varlen import bounds, operands, why_not


class CudaFlashKernel:
    """The two operators, by default torch's, are parameters: a test checks every argument where there is no GPU."""

    name = "cuda_flash"

    def __init__(
        self,
        forward_op: Callable[..., Any] | None = None,
        backward_op: Callable[..., Any] | None = None,
    ) -> None:
        forward, backward = cuda_flash_operators()
        self.forward_op, self.backward_op = forward_op or forward, backward_op or backward

    def why_not(self, device: torch.device, dtype: torch.dtype, head_dim: int, softmax: Softmax) -> str | None:
        if device.type == "cuda" and softmax.softcap is not None:
            return "torch's CUDA flash operator has no softcap; the flash-attn package has"
        if (reason := why_not(device, dtype, head_dim)) is not None:
            return reason
        if not torch.backends.cuda.is_flash_attention_available():
            found = f"torch {installed_version('torch')}"
            return f"{found} was built without FlashAttention: install a build of torch that has it"
        return None

    def forward(
        self, q_THD: Tensor, k_KGD: Tensor, v_KGE: Tensor, segments: Segments, softmax: Softmax
    ) -> tuple[Tensor, Tensor]:
        q, k, v = operands(q_THD, k_KGD, v_KGE)
        call = bounds(segments)
        out, lse_HT, _, _, _ = self.forward_op(
            q,
            k,
            v,
            segments.cu_seqlens_q,
            segments.cu_seqlens_k,
            call.max_seqlen_q,
            call.max_seqlen_k,
            0.0,
            call.causal,
            False,
            scale=softmax.scale,
            window_size_left=call.left,
            window_size_right=call.right,
        )
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
        call = bounds(segments)
        # Dropout is 0, so the state of its random numbers is asked for but never read.
        rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        unused = torch.empty(0, device=q.device)
        dq, dk, dv = self.backward_op(
            dout,
            q,
            k,
            v,
            out,
            lse_HT.contiguous(),
            segments.cu_seqlens_q,
            segments.cu_seqlens_k,
            call.max_seqlen_q,
            call.max_seqlen_k,
            0.0,
            call.causal,
            rng_state,
            unused,
            scale=softmax.scale,
            window_size_left=call.left,
            window_size_right=call.right,
        )
        head_dim = q_THD.shape[2]
        return dq[..., :head_dim], dk[..., :head_dim], dv[..., : v_KGE.shape[2]]
