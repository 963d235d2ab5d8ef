"""One attention call over the mesh as two functions, forward and backward, that know nothing of autograd.

Forward: heads -> tokens (one all-to-all along ulysses), then the ring. The way back, tokens -> heads (one all-to-all),
is a function of its own (`ulysses.gather_heads_scatter_seq`). Backward: the mirror image. With one rank there is no
communication and no copy. `functional` makes autograd functions of them, `custom_op` a registered operator.

Shape suffixes: B rows, L local tokens of a row, T = B * U * L tokens of a ring shard, H query heads, G kv heads, D key
width, E value width, X all columns of a message; lower case h, g: the heads that this rank keeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batch.context import AttentionShape, ForwardContext
from ..batch.device_schedule import head_runs
from ..batch.layout import MaskSpec, SequenceLayout
from ..errors import UspModelError
from ..kernels import Request, Softmax, check_scores, choose_kernel
from ..sharding.heads import split_heads
from ..utils.dtypes import no_autocast
from .ring import RingCall, ring_backward, ring_forward
from .ulysses import Heads, gather_seq_scatter_heads, gather_seq_scatter_heads_backward

# Queries, keys and values [B, L, heads, width], and one sink per query head or None.
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]
KeptInputs = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
# Kept for the backward besides the inputs: the message of heads that arrived (None: they are the inputs'), the
# output over all tokens of the ring shard, its log-sum-exp. None of them shares memory with an input.
Kept = tuple[Tensor | None, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Everything about one call that is not a tensor.

    Attributes:
        ring: the ring call.
        heads: heads of each ulysses rank.
        request: the call, as a kernel is asked for it.
    """

    ring: RingCall
    heads: Heads
    request: Request


def begin(inputs: Inputs, context: ForwardContext, mask_spec: MaskSpec, softmax: Softmax) -> AttentionCall:
    """The call that a layer begins, counted in the context.

    Raises `UspError`s for shapes that do not fit, on every rank alike.
    """
    q_BLHD, k_BLGD, v_BLGE, sinks_H = inputs
    layout = context.layout
    _check_softmax(softmax)

    def check_and_make() -> AttentionCall:
        _check_shapes(q_BLHD, k_BLGD, v_BLGE, sinks_H, layout)
        (heads, width), (kv_heads, value_width) = q_BLHD.shape[2:], v_BLGE.shape[2:]
        shape = AttentionShape(mask_spec, heads, kv_heads, width, value_width, q_BLHD.dtype)
        return make_call(shape, q_BLHD.device, layout, softmax)

    seen = [None if x is None else (x.shape, x.dtype, x.device) for x in inputs]
    call = layout.memoize(("checked_call", *seen, mask_spec, softmax.scale, softmax.softcap), check_and_make)
    context.attention_calls[call.heads.shape] += 1
    context.kernels[call.request] = call.ring.kernel.name
    return call


def make_call(shape: AttentionShape, device: torch.device, layout: SequenceLayout, softmax: Softmax) -> AttentionCall:
    """Schedule, kernel and heads of a call on a device; made once for all layers of a batch that are alike."""
    key = ("attention_call", shape, device, softmax.scale, softmax.softcap)
    return layout.memoize(key, lambda: _make_call(shape, device, layout, softmax))


def _make_call(shape: AttentionShape, device: torch.device, layout: SequenceLayout, softmax: Softmax) -> AttentionCall:
    mesh = layout.mesh
    shares = split_heads(shape.heads, shape.kv_heads, mesh.ulysses_degree)
    kernel = choose_kernel(device, shape.dtype, shape.width, softmax, layout.kernel, shape.value_width)
    tokens = layout.documents.num_tokens // mesh.ring_degree
    longest = min(tokens, layout.mask(shape.mask_spec).documents.longest)
    check_scores(kernel, max(share.num_query for share in shares), tokens, longest, shape.dtype)
    ring = RingCall(
        work=layout.device_schedule(shape.mask_spec, device),
        mesh=mesh,
        kernel=kernel,
        softmax=softmax,
        heads=head_runs(shares[mesh.ulysses_rank].runs),
    )
    request = Request(device, shape.dtype, shape.width, shape.value_width, softmax)
    return AttentionCall(ring, Heads(shares, mesh, layout.batch, shape), request)


def forward(inputs: Inputs, call: AttentionCall) -> Kept:
    """Tensors to keep for the backward; one of them is the output out_ThE."""
    q_BLHD, k_BLGD, v_BLGE, _ = inputs
    arrived_TX = gather_seq_scatter_heads(q_BLHD, k_BLGD, v_BLGE, call.heads)
    with no_autocast(q_BLHD.device):
        out_ThE, lse_hT = ring_forward(*_at_hand(inputs, arrived_TX, call.heads), call.ring)
    return arrived_TX, out_ThE, lse_hT


def backward(dout_ThE: Tensor, saved: list[Tensor | None], call: AttentionCall) -> Inputs:
    """The gradients of the inputs, from the four of `needed_inputs` and the three that were kept.

    `saved` is emptied: where heads have travelled their memory is free for the message of gradients, if nobody else
    holds them.
    """
    *inputs, arrived_TX, out_ThE, lse_hT = saved
    assert out_ThE is not None and lse_hT is not None
    q_ThD, k_TgD, v_TgE, sinks_h = _at_hand((inputs[0], inputs[1], inputs[2], inputs[3]), arrived_TX, call.heads)
    with no_autocast(dout_ThE.device):
        *grads, dsinks_h = ring_backward(dout_ThE, q_ThD, k_TgD, v_TgE, sinks_h, out_ThE, lse_hT, call.ring)
    saved.clear()
    inputs.clear()
    del arrived_TX, out_ThE, lse_hT, q_ThD, k_TgD, v_TgE
    dq, dk, dv = gather_seq_scatter_heads_backward(grads, call.heads, dout_ThE.dtype)
    if dsinks_h is None:
        return dq, dk, dv, None
    dsinks_H = dsinks_h.new_zeros(call.heads.shape.heads)
    dsinks_H[call.heads.mine.q0 : call.heads.mine.q1] = dsinks_h
    return dq, dk, dv, dsinks_H


def needed_inputs(inputs: Inputs, kept: Kept) -> KeptInputs:
    """The inputs that the backward needs besides what was kept: sinks alone where heads have travelled."""
    return inputs if kept[0] is None else (None, None, None, inputs[3])


def _at_hand(inputs: KeptInputs, arrived_TX: Tensor | None, heads: Heads) -> Inputs:
    """q_ThD, k_TgD, v_TgE and sinks_h of the heads that this rank keeps, over all tokens of the ring shard."""
    q, k, v, sinks_H = inputs
    sinks_h = None if sinks_H is None else sinks_H[heads.mine.q0 : heads.mine.q1]
    if arrived_TX is not None:
        return *heads.split(arrived_TX, heads.mesh.ulysses_rank), sinks_h
    assert q is not None and k is not None and v is not None
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), sinks_h


def check_tensors(q: Any, k: Any, v: Any, sinks: Any) -> None:
    """Raise `UspModelError` for what are no tensors of a device that computes."""
    for name, x in (("queries", q), ("keys", k), ("values", v), ("sinks", sinks)):
        if x is None and name == "sinks":
            continue
        if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_meta:
            mask_spec = f"a {x.layout} tensor on {x.device}" if isinstance(x, Tensor) else repr(x)
            raise UspModelError(
                f"{name}: {mask_spec:.100}",
                rule="attention takes dense tensors with values",
                remedy=f"pass {name} as such a tensor (torch.as_tensor, x.to_dense())",
            )


def _check_softmax(softmax: Softmax) -> None:
    for name, value in (("scaling", softmax.scale), ("softcap", softmax.softcap)):
        if value is None and name == "softcap":
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or (name == "softcap" and not float(value or 0) > 0):
            raise UspModelError(
                f"{name}={value!r:.100}",
                rule="scaling is a finite number; softcap is one above 0, or None",
                remedy="leave scaling out for D ** -0.5" if name == "scaling" else "pass None for no softcap",
            )


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, layout: SequenceLayout) -> None:
    expected = (layout.batch, layout.local_length)
    for name, x in (("queries", q), ("keys", k), ("values", v)):
        if x.ndim != 4 or tuple(x.shape[:2]) != expected:
            raise UspModelError(
                f"{name} of shape {tuple(x.shape)}",
                rule=f"sharded attention takes [batch, local tokens, heads, width] with {expected[0]} x {expected[1]} "
                "tokens, queries and keys of the same tokens (self-attention without a cache)",
                remedy="call the model without past_key_values, and shard inputs with hf_usp.shard",
            )
    if k.shape[2] != v.shape[2] or k.shape[3] != q.shape[3]:
        raise UspModelError(
            f"queries {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}",
            rule="keys have the width of the queries, values as many heads as keys",
            remedy="pass keys and values of the same heads; a latent attention first expands its keys to full heads",
        )
    if min(q.shape[2:]) == 0 or min(k.shape[2:]) == 0 or v.shape[3] == 0:
        raise UspModelError(
            f"queries {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}",
            rule="there is at least one head, of a width of at least 1",
            remedy="pass tensors [batch, local tokens, heads, width] that are not empty",
        )
    if not all(x.is_floating_point() for x in (q, k, v, q if sinks is None else sinks)):
        raise UspModelError(
            f"queries in {q.dtype}, keys in {k.dtype}, values in {v.dtype}"
            + ("" if sinks is None else f", sinks in {sinks.dtype}"),
            rule="attention is computed in floating point",
            remedy="cast them, as in q.to(torch.bfloat16); quantized weights are dequantized before attention",
        )
    if not (q.dtype == k.dtype == v.dtype):
        raise UspModelError(
            f"queries in {q.dtype}, keys in {k.dtype}, values in {v.dtype}",
            rule="queries, keys and values have one dtype",
            remedy="cast them, as in k.to(q.dtype); in a model, keep norms and rotary embeddings in the weights' dtype",
        )
    if sinks is not None and tuple(sinks.shape) != (q.shape[2],):
        raise UspModelError(
            f"sinks of shape {tuple(sinks.shape)}",
            rule=f"there is one sink per query head: ({q.shape[2]},)",
            remedy="pass the sinks of all query heads, as a tensor of one dim; hf_usp cuts them itself",
        )
