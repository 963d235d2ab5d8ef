"""The Python surface of flash-attn over torch's flash operator for CPU, for peers that import flash-attn.

With it they and hf_usp compute on the same kernel, so what is compared is what they do around it. Numbers are exact;
dropout, windows and softcap are refused.
"""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_forward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


# Names, order and defaults are flash-attn's: peers read them.
def flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> tuple:
    """flash-attn's `_flash_attn_forward`: q, k, v [B, L, heads, D]; returns out, lse and two unused values."""
    _check(q, k, causal, (dropout_p, softcap), window_size_left)
    rows = (t.transpose(1, 2) for t in (q, k, v))
    out, lse = _forward_op(*rows, 0.0, causal, scale=softmax_scale)
    return out.transpose(1, 2), lse.contiguous(), None, None


def flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    rng_state: Tensor | None = None,
) -> None:
    """flash-attn's `_flash_attn_backward`: writes dq, dk, dv."""
    _check(q, k, causal, (dropout_p, softcap), window_size_left)
    rows = (t.transpose(1, 2) for t in (dout, q, k, v, out))
    grads = _backward_op(*rows, softmax_lse, 0.0, causal, scale=softmax_scale)
    for total, grad in zip((dq, dk, dv), grads, strict=True):
        total.copy_(grad.transpose(1, 2))


def _check(q: Tensor, k: Tensor, causal: bool, unused: tuple[float, float], left: int | None) -> None:
    # The operator aligns causal masks to the top left, flash-attn to the bottom right: the same on squares alone.
    square = not causal or q.shape[1] == k.shape[1]
    if any(unused) or left not in (-1, None) or not square:
        raise ValueError("the stand-in for flash-attn has no dropout, windows, softcap or oblong causal tiles")


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        out, lse, *_ = flash_forward(q, k, v, 0.0, scale, causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.causal = scale, causal
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        flash_backward(grads[0], q, k, v, out, lse, dq, dk, dv, 0.0, ctx.scale, ctx.causal)
        return dq, dk, dv, None, None


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    **kwargs: Any,
) -> Tensor:
    """flash-attn's differentiable function."""
    return _Flash.apply(q, k, v, softmax_scale if softmax_scale is not None else q.shape[-1] ** -0.5, causal)


def unsupported(*args: Any, **kwargs: Any) -> None:
    """Variable-length calls, which no peer makes here."""
    raise ValueError("the stand-in for flash-attn has no variable-length calls")


def install() -> None:
    """Make `import flash_attn` find this, in this process alone."""
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    names = {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": unsupported}
    low = {"_flash_attn_forward": flash_forward, "_flash_attn_backward": flash_backward}
    low |= {"_flash_attn_varlen_forward": unsupported, "_flash_attn_varlen_backward": unsupported}
    package.__dict__.update(names | {"__version__": "2.8.3", "flash_attn_interface": interface, "__path__": []})
    interface.__dict__.update(names | low)
    for module in (package, interface):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
