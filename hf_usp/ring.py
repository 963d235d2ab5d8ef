"""Ring attention: one loop forward, its mirror image backward. The plan says what each step sends and computes.

Shape suffixes: T own tokens of the ring shard (query rows), K key rows at hand, H query heads, G kv heads, D key width,
E value width.

Forward: the rows that readers need are on their way while this step's tiles are computed; every tile's output and
log-sum-exp are merged in fp32. Backward: keys and values travel again, and each tile's dK, dV go straight home, in
their own dtype, where the owner sums them in fp32. Tiles are given the FINAL output and log-sum-exp, so partial
gradients simply add (Ring Attention, arXiv 2310.01889; the merge is FlashAttention's, arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .comm import Pending, post
from .kernels import Kernel, Softmax, accumulation_dtype
from .mesh import UspMesh
from .ranges import MERGE, TILES, named
from .work import Index, Stage, Work


@dataclass(frozen=True, eq=False)
class RingCall:
    """Everything about one attention call that is not a tensor."""

    work: Work
    mesh: UspMesh
    kernel: Kernel
    softmax: Softmax
    heads: list[tuple[slice, slice]]


def ring_forward(
    q_THD: Tensor, k_TGD: Tensor, v_TGE: Tensor, sinks_H: Tensor | None, call: RingCall
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries over the keys of all ring ranks: out_THE and its log-sum-exp lse_HT."""
    if _needs_no_merge(sinks_H, call):
        with named(TILES):
            return call.kernel.forward(q_THD, k_TGD, v_TGE, call.work.stages[0].calls[0].segments, call.softmax)
    return _forward(q_THD, k_TGD, v_TGE, sinks_H, call)


def ring_backward(
    dout_THE: Tensor,
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGE: Tensor,
    sinks_H: Tensor | None,
    out_THE: Tensor,
    lse_HT: Tensor,
    call: RingCall,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and the sinks, given the output and log-sum-exp of the forward."""
    if _needs_no_merge(sinks_H, call):
        segments = call.work.stages[0].calls[0].segments
        tensors = (dout_THE, q_THD, k_TGD, v_TGE, out_THE, lse_HT)
        with named(TILES):
            return (*call.kernel.backward(*tensors, segments, call.softmax), None)
    dq, dk, dv = _backward(dout_THE, q_THD, k_TGD, v_TGE, out_THE, lse_HT, call)
    return dq, dk, dv, _sink_gradient(dout_THE, out_THE, lse_HT, sinks_H)


def _needs_no_merge(sinks_H: Tensor | None, call: RingCall) -> bool:
    """One kernel call is the whole answer, bit for bit."""
    return call.work.direct and len(call.heads) == 1 and sinks_H is None


def _forward(
    q_THD: Tensor, k_TGD: Tensor, v_TGE: Tensor, sinks_H: Tensor | None, call: RingCall
) -> tuple[Tensor, Tensor]:
    acc = accumulation_dtype(q_THD.dtype)
    out_THE = q_THD.new_zeros(*q_THD.shape[:2], v_TGE.shape[2], dtype=acc)
    lse_HT = q_THD.new_full((q_THD.shape[1], q_THD.shape[0]), float("-inf"), dtype=acc)
    for stage, keys in _arrivals(k_TGD, v_TGE, call):
        _tiles_forward(stage, q_THD, keys(), out_THE, lse_HT, call)
    if sinks_H is not None:
        # A sink is one more key with score `sinks` and value zero: it only joins the normaliser, once, at the end.
        total_HT = torch.logaddexp(lse_HT, sinks_H.to(acc)[:, None])
        out_THE *= (lse_HT - total_HT).exp().T[..., None]
        lse_HT = total_HT
    return out_THE.to(q_THD.dtype), lse_HT


def _tiles_forward(
    stage: Stage, q_THD: Tensor, keys: tuple[Tensor, Tensor], out_THE: Tensor, lse_HT: Tensor, call: RingCall
) -> None:
    """Merge a stage's tiles into `out_THE` and `lse_HT`."""
    k_KGD, v_KGE = keys
    for part in stage.calls:
        q_rows, k_rows, v_rows = q_THD[part.rows], k_KGD[part.keys], v_KGE[part.keys]
        for h, g in call.heads:
            with named(TILES):
                out, lse = call.kernel.forward(q_rows[:, h], k_rows[:, g], v_rows[:, g], part.segments, call.softmax)
            with named(MERGE):
                _merge_(out_THE, lse_HT, part.rows, h, out, lse)


def _backward(
    dout_THE: Tensor, q_THD: Tensor, k_TGD: Tensor, v_TGE: Tensor, out_THE: Tensor, lse_HT: Tensor, call: RingCall
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulation_dtype(q_THD.dtype)
    dq_THD, dk_TGD, dv_TGE = (torch.zeros_like(x, dtype=acc) for x in (q_THD, k_TGD, v_TGE))
    rows = (dout_THE, q_THD, out_THE, lse_HT)
    coming_home: Callable[[], None] | None = None
    for stage, keys in _arrivals(k_TGD, v_TGE, call):
        if stage.source == call.mesh.ring_rank:
            _tiles_backward(stage, rows, keys(), (dq_THD, dk_TGD, dv_TGE), call)
            continue
        packed = _partial_gradients(stage, rows, keys(), dq_THD, call)
        if coming_home is not None:
            coming_home()
        coming_home = _send_home(stage, packed, dk_TGD, dv_TGE, call.mesh)
        del packed
    if coming_home is not None:
        coming_home()
    return dq_THD.to(q_THD.dtype), dk_TGD.to(k_TGD.dtype), dv_TGE.to(v_TGE.dtype)


def _partial_gradients(
    stage: Stage, rows: tuple[Tensor, ...], keys: tuple[Tensor, Tensor], dq_THD: Tensor, call: RingCall
) -> Tensor:
    """dK, dV of the keys that arrived, packed in their own dtype; dq is added to."""
    k_KGD, v_KGE = keys
    acc = dq_THD.dtype
    dk_KGD, dv_KGE = torch.zeros_like(k_KGD, dtype=acc), torch.zeros_like(v_KGE, dtype=acc)
    _tiles_backward(stage, rows, keys, (dq_THD, dk_KGD, dv_KGE), call)
    return _pack(dk_KGD.to(k_KGD.dtype), dv_KGE.to(v_KGE.dtype))


def _tiles_backward(
    stage: Stage,
    rows: tuple[Tensor, ...],
    keys: tuple[Tensor, Tensor],
    totals: tuple[Tensor, Tensor, Tensor],
    call: RingCall,
) -> None:
    """Add the gradients of a stage's tiles to `totals` (dq_THD, dk_KGD, dv_KGE); `rows` = dout, q, out, lse."""
    dout_THE, q_THD, out_THE, lse_HT = rows
    k_KGD, v_KGE = keys
    dq_THD, dk_KGD, dv_KGE = totals
    for part in stage.calls:
        at = part.rows
        dout_rows, q_rows, out_rows, lse_rows = dout_THE[at], q_THD[at], out_THE[at], lse_HT[:, at]
        k_rows, v_rows = k_KGD[part.keys], v_KGE[part.keys]
        for h, g in call.heads:
            with named(TILES):
                dq, dk, dv = call.kernel.backward(
                    dout_rows[:, h], q_rows[:, h], k_rows[:, g], v_rows[:, g], out_rows[:, h], lse_rows[h],
                    part.segments, call.softmax,
                )  # fmt: skip
            with named(MERGE):
                _add_(dq_THD[:, h], at, dq, True)
                _add_(dk_KGD[:, g], part.keys, dk, part.keys_distinct)
                _add_(dv_KGE[:, g], part.keys, dv, part.keys_distinct)


def _arrivals(k_TGD: Tensor, v_TGE: Tensor, call: RingCall) -> Any:
    """Yield each stage with a function that returns its keys and values, the next stage's transfer already started."""
    stages = call.work.stages
    ready: Callable[[], tuple[Tensor, Tensor]] = lambda: (k_TGD, v_TGE)  # noqa: E731
    for i, stage in enumerate(stages):
        now = ready
        if i + 1 < len(stages):
            ready = _start(stages[i + 1], k_TGD, v_TGE, call.mesh)
        yield stage, now


def _start(stage: Stage, k_TGD: Tensor, v_TGE: Tensor, mesh: UspMesh) -> Callable[[], tuple[Tensor, Tensor]]:
    """Send the key and value rows that the reader needs, packed side by side; receive those that this rank needs."""
    packed = _pack(k_TGD[stage.send], v_TGE[stage.send])
    arriving = packed.new_empty(stage.num_received, k_TGD[0].numel() + v_TGE[0].numel())
    pending = _exchange(mesh, (packed, stage.reader), (arriving, stage.source))
    held = [arriving]  # emptied when taken, so that the block lives no longer than its tiles
    del packed, arriving

    def keys() -> tuple[Tensor, Tensor]:
        pending.wait()
        return _unpack(held.pop(), k_TGD, v_TGE)

    return keys


def _send_home(stage: Stage, packed: Tensor, dk_TGD: Tensor, dv_TGE: Tensor, mesh: UspMesh) -> Callable[[], None]:
    """The mirror of `_start`: gradients of the received rows go to their owner; add those that come back."""
    arriving = packed.new_empty(stage.num_sent, packed.shape[1])
    pending = _exchange(mesh, (packed, stage.source), (arriving, stage.reader))

    def add() -> None:
        pending.wait()
        dk, dv = _unpack(arriving, dk_TGD, dv_TGE)
        _add_(dk_TGD, stage.send, dk, True)
        _add_(dv_TGE, stage.send, dv, True)

    return add


def _exchange(mesh: UspMesh, send: tuple[Tensor, int], receive: tuple[Tensor, int]) -> Pending:
    assert mesh.ring_group is not None
    ranks = mesh.ring_ranks
    return post(mesh.ring_group, [(send[0], ranks[send[1]])], [(receive[0], ranks[receive[1]])])


def _pack(k_KGD: Tensor, v_KGE: Tensor) -> Tensor:
    return torch.cat([k_KGD.flatten(1), v_KGE.flatten(1)], dim=1)


def _unpack(packed: Tensor, k_TGD: Tensor, v_TGE: Tensor) -> tuple[Tensor, Tensor]:
    """Views on the keys and values in a packed message, with the widths of `k_TGD` and `v_TGE`."""
    k, v = packed.split([k_TGD[0].numel(), v_TGE[0].numel()], dim=1)
    return k.unflatten(1, k_TGD.shape[1:]), v.unflatten(1, v_TGE.shape[1:])


def _merge_(out_THE: Tensor, lse_HT: Tensor, rows: Index, heads: slice, out: Tensor, lse: Tensor) -> None:
    """Merge the softmax over more keys into these rows and heads, in place."""
    out_so_far, lse_so_far = out_THE[:, heads], lse_HT[heads]
    old_out, old_lse = out_so_far[rows], lse_so_far[:, rows]
    # The new keys' share of the total weight. exp(-inf - x) = 0 makes the first tile of a row a plain copy.
    weight_THE = torch.sigmoid(lse - old_lse).T[..., None]
    out_so_far[rows] = torch.lerp(old_out, out.to(old_out.dtype), weight_THE)
    lse_so_far[:, rows] = torch.logaddexp(old_lse, lse)


def _add_(total: Tensor, rows: Index, part: Tensor, distinct: bool) -> None:
    """total[rows] += part, in the dtype of `total`, also where rows repeat."""
    if distinct:
        total[rows] += part
    else:
        total.index_add_(0, rows, part.to(total.dtype))  # type: ignore[arg-type]


def _sink_gradient(dout_THE: Tensor, out_THE: Tensor, lse_HT: Tensor, sinks_H: Tensor | None) -> Tensor | None:
    """d loss / d sink = - sum over rows of (the sink's weight) x (dout . out)."""
    if sinks_H is None:
        return None
    delta_HT = (dout_THE.to(lse_HT.dtype) * out_THE).sum(-1).T
    return -((sinks_H.to(lse_HT.dtype)[:, None] - lse_HT).exp() * delta_HT).sum(-1).to(sinks_H.dtype)
