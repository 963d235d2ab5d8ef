"""The functional core: exact attention over a sequence that is spread over a 2D mesh of ranks.

Shape suffixes: B rows, L local tokens of a row, H query heads, G kv heads, D key width, E value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..batch.context import ForwardContext
from ..batch.layout import MaskSpec, SequenceLayout
from ..batch.sharded_tensors import ShardedMask, context_from_handle, make_handle
from ..errors import UspModelError
from ..kernels import Softmax
from ..sharding.masks import UNLIMITED
from ..utils.autograd import forbid_double_backward
from ..utils.validation import check_switches
from .call import AttentionCall, Inputs, backward, begin, check_tensors, forward, needed_inputs
from .custom_op import attend_custom_op, needs_custom_op
from .ulysses import Heads, gather_heads_scatter_seq, gather_heads_scatter_seq_backward


def usp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """Attention of local queries over the keys of all ranks of the layout's mesh. Differentiable.

    Args:
        q: local queries [B, L, H, D], for the tokens that `hf_usp.shard` gives this rank.
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
    check_tensors(q, k, v, sinks)
    check_switches(causal=causal)
    if not isinstance(layout, SequenceLayout):
        raise UspModelError(
            f"layout={layout!r:.100}",
            rule="the layout says which tokens this rank holds",
            remedy='pass hf_usp.shard(batch, mesh)["usp"]',
        )
    if sliding_window is not None and (isinstance(sliding_window, bool) or not isinstance(sliding_window, int)):
        raise UspModelError(
            f"sliding_window={sliding_window!r}",
            rule="a window is a whole number of keys",
            remedy="pass sliding_window=1 or more as an int, or None for no window",
        )
    if sliding_window is not None and sliding_window < 1:
        raise UspModelError(
            f"sliding_window={sliding_window}",
            rule="a window holds at least the query itself",
            remedy="pass sliding_window=1 or more, or None for no window",
        )
    left = UNLIMITED if sliding_window is None else sliding_window - 1
    mask_spec = MaskSpec(left, 0) if causal else MaskSpec(left, left)
    width = q.shape[-1] if q.ndim and q.shape[-1] else 1  # other shapes are refused further down
    softmax = Softmax(width**-0.5 if scaling is None else scaling, softcap)
    return attend_without_mask((q, k, v, sinks), ForwardContext(layout), mask_spec, softmax)


def attend(inputs: Inputs, mask: ShardedMask, softmax: Softmax) -> Tensor:
    """Attention under the mask that a layer gets; see `usp_attention`. torch.compile takes it into its graph.

    Args:
        inputs: q_BLHD, k_BLGD, v_BLGE, sinks_H or None.
        mask: the mask, with the context of the forward.
        softmax: scaling and softcap.

    Returns:
        out_BLHE.
    """
    if torch.compiler.is_compiling():
        return attend_custom_op(inputs, mask, softmax)
    context = context_from_handle(mask.handle)
    if context.interception is not None:
        return context.interception.answer(inputs, mask.mask_spec, softmax)
    if needs_custom_op():
        return attend_custom_op(inputs, mask, softmax)
    return _attend(inputs, context, mask.mask_spec, softmax)


def _attend(inputs: Inputs, context: ForwardContext, mask_spec: MaskSpec, softmax: Softmax) -> Tensor:
    call = begin(inputs, context, mask_spec, softmax)
    out_ThE = _Attention.apply(*inputs, call)
    if call.ring.mesh.ulysses_group is None:
        return gather_heads_scatter_seq(out_ThE, call.heads)
    return _TokensToHeads.apply(out_ThE, call.heads)


@torch.compiler.disable
def attend_without_mask(inputs: Inputs, context: ForwardContext, mask_spec: MaskSpec, softmax: Softmax) -> Tensor:
    """The same where no mask has brought a handle: a compiled graph ends here."""
    if context.interception is not None:
        return context.interception.answer(inputs, mask_spec, softmax)
    if needs_custom_op():
        return attend_custom_op(inputs, ShardedMask(make_handle(context), mask_spec), softmax)
    return _attend(inputs, context, mask_spec, softmax)


class _Attention(torch.autograd.Function):
    """q_BLHD, k_BLGD, v_BLGE, sinks_H -> out_ThE."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: AttentionCall) -> Tensor:
        inputs = (q, k, v, sinks)
        kept = forward(inputs, call)
        ctx.save_for_backward(*needed_inputs(inputs, kept), *kept)
        ctx.call = call
        return kept[1]

    @staticmethod
    @forbid_double_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()  # Unless the graph is retained, the list is now all that holds them.
        return *backward(grads[0], saved, ctx.call), None


class _TokensToHeads(torch.autograd.Function):
    """out_ThE -> out_BLHE, apart from attention so that the gradient that comes in is free while tiles are computed."""

    @staticmethod
    def forward(ctx: Any, out_ThE: Tensor, heads: Heads) -> Tensor:
        ctx.heads = heads
        return gather_heads_scatter_seq(out_ThE, heads)

    @staticmethod
    @forbid_double_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return gather_heads_scatter_seq_backward(grads[0], ctx.heads), None
