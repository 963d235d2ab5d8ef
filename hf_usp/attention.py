"""The functional core: exact attention over a sequence that is spread over a 2D mesh of ranks.

Shape suffixes: B rows, L local tokens of a row, T = B * U * L tokens of a ring shard, H query heads, G kv heads, D key
width, E value width.

One call: heads -> tokens (one all-to-all along ulysses), the ring, tokens -> heads (one all-to-all). With one rank
there is no communication and no copy.
"""

from __future__ import annotations

from torch import Tensor

from .batch import Layout, MaskKind
from .degrees import split_heads
from .errors import UspModelError
from .kernels import Softmax, choose_kernel
from .layout import UNLIMITED
from .ring import RingCall, ring_attention
from .ulysses import heads_to_tokens, tokens_to_heads
from .work import head_runs


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
    _check_shapes(q_BLHD, k_BLGD, v_BLGE, sinks_H, layout)
    layout.calls, layout.dtype = layout.calls + 1, q_BLHD.dtype
    mesh = layout.mesh
    shares = split_heads(q_BLHD.shape[2], k_BLGD.shape[2], mesh.ulysses_degree)
    mine = shares[mesh.ulysses_rank]
    width = max(q_BLHD.shape[3], v_BLGE.shape[3])
    call = RingCall(
        work=layout.work(kind, q_BLHD.device),
        mesh=mesh,
        kernel=choose_kernel(q_BLHD.device, q_BLHD.dtype, width, softmax, layout.kernel),
        softmax=softmax,
        heads=head_runs(mine.runs),
    )
    q_ThD, k_TgD, v_TgE = heads_to_tokens(q_BLHD, k_BLGD, v_BLGE, shares, mesh)
    sinks_h = None if sinks_H is None else sinks_H[mine.q0 : mine.q1]
    out_ThE = ring_attention(q_ThD, k_TgD, v_TgE, sinks_h, call)
    return tokens_to_heads(out_ThE, layout.batch, shares, mesh)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, layout: Layout) -> None:
    expected = (layout.batch, layout.local_length)
    for name, x in (("queries", q), ("keys", k), ("values", v)):
        if x.ndim != 4 or tuple(x.shape[:2]) != expected:
            raise UspModelError(
                f"{name} of shape {tuple(x.shape)}",
                rule=f"sharded attention takes [batch, local tokens, heads, width] with {expected[0]} x {expected[1]} "
                "tokens, queries and keys of the same tokens (self-attention without a cache)",
                remedy="call the model without past_key_values, and cut inputs with hf_usp.shard",
            )
    if k.shape[2] != v.shape[2] or k.shape[3] != q.shape[3]:
        raise UspModelError(
            f"queries {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}",
            rule="keys have the width of the queries, values as many heads as keys",
        )
    if not (q.dtype == k.dtype == v.dtype):
        raise UspModelError(f"queries in {q.dtype}, keys in {k.dtype}, values in {v.dtype}", rule="one dtype")
    if sinks is not None and tuple(sinks.shape) != (q.shape[2],):
        raise UspModelError(f"sinks of shape {tuple(sinks.shape)}", rule=f"one per query head: ({q.shape[2]},)")
