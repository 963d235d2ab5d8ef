"""Attention as an operator, `torch.ops.hf_usp.usp_flash_attn`, and the exchange of recurrent layers as another.

Selective checkpointing decides over operators, and `torch.compile` puts operators into its graphs without looking
inside. Everywhere else attention is an autograd function, whose parts stay visible to profilers and dispatch modes.
Policies of others know attention by names: TRL's selective checkpointing keeps operators with `flash_attn` in theirs.

The context of the forward reaches the operator with a handle (`hf_usp.batch.sharded_tensors`).

Shape suffixes: as in `core`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch.context import AttentionShape
from ..batch.layout import MaskSpec
from ..batch.sharded_tensors import ShardedMask, context_from_handle
from ..compat import under_selective_checkpointing
from ..kernels import Softmax, accumulation_dtype
from ..sharding.heads import split_heads
from ..utils.autograd import forbid_double_backward
from .call import Inputs, backward, begin, forward, make_call
from .ulysses import gather_heads_scatter_seq, gather_heads_scatter_seq_backward


def needs_custom_op() -> bool:
    """Whether somebody who looks at operators is watching: torch.compile, or selective checkpointing."""
    return torch.compiler.is_compiling() or under_selective_checkpointing()


def attend_custom_op(inputs: Inputs, mask: ShardedMask, softmax: Softmax) -> Tensor:
    """out_BLHE, as a call of the operator. Differentiable."""
    mesh = context_from_handle(mask.handle).layout.mesh
    mask_spec, place = [int(number) for number in mask.mask_spec], [mesh.ulysses_degree, mesh.ulysses_rank]
    return torch.ops.hf_usp.usp_flash_attn(*inputs, mask.handle, mask_spec, softmax.scale, softmax.softcap, place)[0]


@torch.library.custom_op("hf_usp::usp_flash_attn", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    handle: Tensor,
    mask_spec: Sequence[int],
    scale: float,
    softcap: float | None,
    place: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out_BLHE, arrived_TX, out_ThE, lse_hT; without an exchange of heads the two in the middle are empty.

    mask_spec: the fields of a `MaskSpec`. place: ulysses degree and rank, which tell the shapes.
    """
    inputs = (q, k, v, sinks)
    call = begin(inputs, context_from_handle(handle), _to_mask_spec(mask_spec), Softmax(scale, softcap))
    arrived, out_ThE, lse = forward(inputs, call)
    out = gather_heads_scatter_seq(out_ThE, call.heads)
    # The outputs of an operator share no memory, and have the strides that its fake says.
    if arrived is None:
        arrived, out_ThE = q.new_empty(0), q.new_empty(0)
    return out.contiguous(), arrived, out_ThE.contiguous(), lse.contiguous()


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, sinks: Any, handle: Any, mask_spec: Any, scale: Any, softcap: Any, place: Any
) -> Any:
    degree, rank = (int(number) for number in place)  # symbols, where models on several meshes are compiled
    mine = split_heads(q.shape[2], k.shape[2], degree)[rank]
    tokens, width, value_width = q.shape[0] * q.shape[1] * degree, q.shape[3], v.shape[3]
    lse_hT = q.new_empty(mine.num_query, tokens, dtype=accumulation_dtype(q.dtype))
    out_BLHE = q.new_empty(*q.shape[:3], value_width)
    if degree == 1:
        return out_BLHE, q.new_empty(0), q.new_empty(0), lse_hT
    columns = mine.num_query * width + mine.num_kv * (width + value_width)
    return out_BLHE, q.new_empty(tokens, columns), q.new_empty(tokens, mine.num_query, value_width), lse_hT


def _to_mask_spec(numbers: Sequence[int]) -> MaskSpec:
    left, right, chunk, chunks_from_row_start = numbers
    return MaskSpec(left, right, chunk, bool(chunks_from_row_start))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    q, k, v, sinks, ctx.handle, *ctx.rest = inputs
    out, arrived, out_ThE, lse = output
    ctx.sizes = [q.shape[2], k.shape[2], q.shape[3], v.shape[3]]
    travelled = ctx.rest[-1][0] > 1
    kept = (None, None, None, sinks, arrived, out_ThE, lse) if travelled else (q, k, v, sinks, None, out, lse)
    ctx.save_for_backward(*kept)
    ctx.mark_non_differentiable(arrived, out_ThE, lse)
    ctx.set_materialize_grads(False)


@forbid_double_backward
def _attend_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    mask_spec, scale, softcap, _ = ctx.rest
    saved = ctx.saved_tensors  # looked at once: checkpointing recomputes the layer for it
    *result, dsinks = torch.ops.hf_usp.attend_backward(
        grads[0], *saved, ctx.handle, ctx.sizes, mask_spec, scale, softcap
    )
    return *result, None if saved[3] is None else dsinks, None, None, None, None, None


_attend.register_autograd(_attend_backward, setup_context=_keep)


@torch.library.custom_op("hf_usp::attend_backward", mutates_args=())
def _backward(
    dout: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    sinks: Tensor | None,
    arrived: Tensor | None,
    out: Tensor,
    lse: Tensor,
    handle: Tensor,
    sizes: Sequence[int],
    mask_spec: Sequence[int],
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq_BLHD, dk_BLGD, dv_BLGE, dsinks_H (empty without sinks) of `attend`, from what its forward has kept."""
    layout = context_from_handle(handle).layout
    heads, kv_heads, width, value_width = sizes
    shape = AttentionShape(_to_mask_spec(mask_spec), heads, kv_heads, width, value_width, dout.dtype)
    call = make_call(shape, dout.device, layout, Softmax(scale, softcap))
    out_ThE = out if arrived is not None else out.flatten(0, 1)
    dout_ThE = gather_heads_scatter_seq_backward(dout, call.heads)
    *grads, dsinks = backward(dout_ThE, [q, k, v, sinks, arrived, out_ThE, lse], call)
    dq, dk, dv = (grad.contiguous() for grad in grads)
    return dq, dk, dv, dout.new_empty(0) if dsinks is None else dsinks


@_backward.register_fake
def _(
    dout: Tensor, q: Any, k: Any, v: Any, sinks: Any, arrived: Any, out: Any, lse: Any, handle: Any, sizes: Any, *_: Any
) -> Any:
    heads, kv_heads, width, value_width = sizes
    tokens = dout.shape[:2]
    dsinks = dout.new_empty(0) if sinks is None else torch.empty_like(sinks)
    shapes = (heads, width), (kv_heads, width), (kv_heads, value_width)
    return *(dout.new_empty(*tokens, *shape) for shape in shapes), dsinks
