"""The functional core: exact attention over a sequence that is spread over a 2D mesh of ranks.

Shape suffixes: B rows, L local tokens of a row, H query heads, G kv heads, D key width, E value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .batch import Layout, MaskKind
from .core import AttentionCall, backward, forward, make_call
from .errors import UspModelError
from .kernels import Softmax
from .layout import UNLIMITED


def usp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """Attention of local queries over the keys of all ranks of the layout's mesh. Differentiable.

    Args:
        q: local queries [B, L, H, D], as `hf_usp.shard` cut the tokens.
        k, v: local keys [B, L, G, D] and values [B, L, G, E]; H is a multiple of G, E may differ from D.
        layout: of this batch, the same on every rank (`hf_usp.shard(...)["usp"]`).
        scaling: factor of q.k, by default D ** -0.5.
        sliding_window: a query sees this many keys, itself included; with `causal=False`, that many on either side.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
        sinks: one extra score per query head [H] that only joins the normaliser (gpt-oss).
        causal: a query sees no later key.

    Returns:
        [B, L, H, E] in the dtype of q. Rows that see no key (padding) are zero.

    Raises:
        UspError subclasses, on every rank alike, for shapes and arguments that do not fit.

    Source: USP, arXiv 2405.07719, section 3 (Ulysses and Ring composed on a 2D mesh).
    """
    if sliding_window is not None and sliding_window < 1:
        raise UspModelError(f"sliding_window={sliding_window}", rule="a window holds at least the query itself")
    left = UNLIMITED if sliding_window is None else sliding_window - 1
    kind = MaskKind(left, 0) if causal else MaskKind(left, left)
    return attend(
        q, k, v, sinks, layout, kind, Softmax(scaling if scaling is not None else q.shape[-1] ** -0.5, softcap)
    )


def attend(
    q_BLHD: Tensor,
    k_BLGD: Tensor,
    v_BLGE: Tensor,
    sinks_H: Tensor | None,
    layout: Layout,
    kind: MaskKind,
    softmax: Softmax,
) -> Tensor:
    """The same for any kind of mask; see `usp_attention`. Returns out_BLHE."""
    inputs = (q_BLHD, k_BLGD, v_BLGE, sinks_H)
    return _Attention.apply(*inputs, make_call(inputs, layout, kind, softmax))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: AttentionCall) -> Tensor:
        inputs = (q, k, v, sinks)
        out_BLHE, kept = forward(inputs, call)
        # Where heads have travelled, the backward needs those that arrived, and not the inputs.
        ctx.save_for_backward(*(inputs if kept[0] is None else (None, None, None, sinks)), *kept)
        ctx.call = call
        return out_BLHE

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return *backward(grads[0], saved[:4], saved[4:], ctx.call), None
