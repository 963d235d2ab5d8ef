"""Ring attention: one loop forward, its mirror image backward. The ring schedule lists each step's rows and tiles.

Each rank keeps its queries. Keys and values come directly from the rank that holds them, and only rows that some query
of the receiver sees (`hf_usp.sharding.schedule`). Rank 0 of a ring of 4:

    step 0    own K, V      -> tiles          step 1 receives K, V of rank 3, sends own to rank 1
    step 1    K, V of 3     -> tiles, merge   step 2 receives K, V of rank 2, sends own to rank 2
    step 2    K, V of 2     -> tiles, merge   step 3 receives K, V of rank 1, sends own to rank 3
    step 3    K, V of 1     -> tiles, merge
              computed now                    sent and received meanwhile

    for step in schedule:                           # ring_forward
        start_send_and_receive(step.next)           # overlaps with the tiles below; on a GPU that of step.next.next
        for tile in step.tiles:
            merge(out, lse, kernel(q[tile.rows], k[tile.keys], v[tile.keys]))
        k, v = wait_for(step.next)

Backward: the same loop. The kernel gets the FINAL output and log-sum-exp, so the partial gradients of tiles simply add
up (Ring Attention, arXiv 2310.01889). dQ stays; dK and dV are sent to the owner of the keys in their own dtype, and the
owner sums them in fp32. `softmax_merge.py` decides which sums and merges are needed (FlashAttention, arXiv 2205.14135).

Shape suffixes: T own tokens of the ring shard (query rows), K key rows at hand, H query heads, G kv heads, D key width,
E value width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch.device_schedule import EVERY, DeviceSchedule, DeviceStep, Index, KernelCall, take
from ..distributed.comm import P2PHandle, start_p2p
from ..distributed.mesh import UspMesh
from ..kernels import Kernel, Softmax
from ..utils.profiling import MERGE, TILES, annotate
from .messages import MessageBuffers, OwnRows, unpack
from .softmax_merge import GradientSum, OnlineSoftmax


@dataclass(frozen=True, eq=False)
class RingCall:
    """Everything about one attention call that is not a tensor.

    Attributes:
        work: the ring schedule on this device.
        mesh: the ranks; the ring group is used.
        kernel: computes one tile.
        softmax: scaling and softcap.
        heads: query-head and kv-head slices of each kernel call; more than one where heads split unevenly.
        buffers: memory of its messages.
    """

    work: DeviceSchedule
    mesh: UspMesh
    kernel: Kernel
    softmax: Softmax
    heads: list[tuple[slice, slice]]
    buffers: MessageBuffers = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "buffers", MessageBuffers(self.work))


class _Rows:
    """dout_THE, q_THD, out_THE and lse_HT by rows. Steps that read the same slice of rows get the same views."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors, self._views = tensors, dict[tuple[int, int], list[Tensor]]()

    def at(self, rows: Index) -> Sequence[Tensor]:
        if rows is EVERY:
            return self._tensors
        if not isinstance(rows, slice):
            return self._taken(rows)
        edges = rows.start, rows.stop
        if edges not in self._views:
            self._views[edges] = self._taken(rows)
        return self._views[edges]

    def _taken(self, rows: Index) -> list[Tensor]:
        *per_row, lse_HT = self._tensors
        return [*(x[rows] for x in per_row), lse_HT[:, rows]]


class Block(NamedTuple):
    """Keys and values that a step computes with.

    Attributes:
        k: keys k_KGD.
        v: values v_KGE.
        message: the received buffer of which k and v are views; None for own keys.
    """

    k: Tensor
    v: Tensor
    message: Tensor | None = None


def ring_forward(
    q_THD: Tensor, k_TGD: Tensor, v_TGE: Tensor, sinks_H: Tensor | None, call: RingCall
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries over the keys of all ring ranks: out_THE and its log-sum-exp lse_HT."""
    if _needs_no_merge(sinks_H, call):
        segments = call.work.stages[0].calls[0].segments
        return annotate(TILES, call.kernel.forward, q_THD, k_TGD, v_TGE, segments, call.softmax)
    merged = OnlineSoftmax(q_THD, v_TGE.shape[2], call.work, exact=sinks_H is not None)
    for stage, block in _arrivals(k_TGD, v_TGE, call):
        _tiles_forward(stage, q_THD, block, merged, call)
        if block.message is not None:
            call.buffers.give(block.message)
        del block
    out_THE, lse_HT = merged.result()
    if sinks_H is not None:
        # A sink is one more key with score `sinks` and value zero: it only joins the normaliser, once, at the end.
        total_HT = torch.logaddexp(lse_HT, sinks_H.to(lse_HT.dtype)[:, None])
        out_THE *= (lse_HT - total_HT).exp().T[..., None]
        lse_HT = total_HT
    return out_THE.to(q_THD.dtype), lse_HT


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
    """Gradients of q, k, v, in the dtype they were summed in, and of the sinks, given the final output and lse."""
    work = call.work
    if _needs_no_merge(sinks_H, call):
        rest = (out_THE, lse_HT, work.stages[0].calls[0].segments, call.softmax)
        return *annotate(TILES, call.kernel.backward, dout_THE, q_THD, k_TGD, v_TGE, *rest), None
    rows = _Rows(dout_THE, q_THD, out_THE, lse_HT)
    dq, dk, dv = GradientSum(q_THD, work.rows), GradientSum(k_TGD, work.keys), GradientSum(v_TGE, work.keys)
    arriving_gradients: Callable[[], None] = lambda: None  # noqa: E731
    for stage, block in _arrivals(k_TGD, v_TGE, call):
        if block.message is None:
            _tiles_backward(stage, rows, block, (dq, dk, dv), call)
            continue
        packed = _partial_gradients(stage, rows, block, dq, call)
        del block
        arriving_gradients()
        arriving_gradients = _send_to_owner(stage, packed, dk, dv, call)
        del packed
    arriving_gradients()
    return dq.result(), dk.result(), dv.result(), _sink_gradient(dout_THE, out_THE, lse_HT, sinks_H)


def _needs_no_merge(sinks_H: Tensor | None, call: RingCall) -> bool:
    """One kernel call is the whole answer, bit for bit."""
    return call.work.is_single_call and len(call.heads) == 1 and sinks_H is None


def _tiles_forward(stage: DeviceStep, q_THD: Tensor, block: Block, merged: OnlineSoftmax, call: RingCall) -> None:
    """Compute the tiles of a step and merge them."""
    for part in stage.calls:
        q_rows, k_rows, v_rows = take(q_THD, part.rows), take(block.k, part.keys), take(block.v, part.keys)
        for h, g in call.heads:
            operands = (q_rows, k_rows, v_rows) if h is EVERY else (q_rows[:, h], k_rows[:, g], v_rows[:, g])
            out, lse = annotate(TILES, call.kernel.forward, *operands, part.segments, call.softmax)
            annotate(MERGE, merged.add, out, lse, part, h)
            del operands, out, lse  # before the next ones are made
        del q_rows, k_rows, v_rows


def _tiles_backward(
    stage: DeviceStep,
    rows: _Rows,
    block: Block,
    sums: tuple[GradientSum, GradientSum, GradientSum],
    call: RingCall,
) -> None:
    """Add the gradients of a step's tiles to `sums` (of dq, dk, dv)."""

    def add(grads: tuple[Tensor, Tensor, Tensor], part: KernelCall, h: slice, g: slice) -> None:
        dq, dk, dv = grads
        sums[0].add(dq, part.rows, h, is_first_write=part.first_write_q)
        sums[1].add(dk, part.keys, g, is_first_write=part.first_write_k, unique_keys=part.unique_keys)
        sums[2].add(dv, part.keys, g, is_first_write=part.first_write_k, unique_keys=part.unique_keys)

    for part in stage.calls:
        dout_rows, q_rows, out_rows, lse_rows = rows.at(part.rows)
        k_rows, v_rows = take(block.k, part.keys), take(block.v, part.keys)
        for h, g in call.heads:
            if h is EVERY:
                operands = (dout_rows, q_rows, k_rows, v_rows, out_rows, lse_rows)
            else:
                operands = (dout_rows[:, h], q_rows[:, h], k_rows[:, g], v_rows[:, g], out_rows[:, h], lse_rows[h])
            grads = annotate(TILES, call.kernel.backward, *operands, part.segments, call.softmax)
            annotate(MERGE, add, grads, part, h, g)
            del operands, grads
        del dout_rows, q_rows, out_rows, lse_rows, k_rows, v_rows


def _partial_gradients(stage: DeviceStep, rows: _Rows, block: Block, dq: GradientSum, call: RingCall) -> Tensor:
    """dK, dV of the keys that arrived, summed in the message that is sent to their owner; dQ is added to `dq`.

    Where one kernel call reads all of the keys, their gradients overwrite the received message.
    """
    assert block.message is not None
    once = len(stage.calls) == len(call.heads) == 1
    packed = block.message if once else call.buffers.take(stage.num_received, block.message.shape[1], block.message)
    dk, dv = (GradientSum(x, stage.keys, into=x) for x in unpack(packed, block.k, block.v))
    _tiles_backward(stage, rows, block, (dq, dk, dv), call)
    dk.result()
    dv.result()
    if not once:
        call.buffers.give(block.message)
    return packed


def _arrivals(k_TGD: Tensor, v_TGE: Tensor, call: RingCall) -> Iterator[tuple[DeviceStep, Block]]:
    """Yield each step with its keys and values; the transfers of the next ones are under way."""
    call.buffers.begin(k_TGD)
    own, stages = OwnRows(k_TGD, v_TGE, call.buffers), call.work.stages
    coming = map(partial(_start, own, call), range(1, len(stages)))
    arriving = deque(islice(coming, call.buffers.ahead))
    yield stages[0], Block(k_TGD, v_TGE)
    while arriving:
        arriving.extend(islice(coming, 1))
        yield arriving.popleft()()


def _start(own: OwnRows, call: RingCall, step: int) -> Callable[[], tuple[DeviceStep, Block]]:
    """Send the key and value rows that `send_rank` needs; receive those that this rank needs."""
    stage = call.work.stages[step]
    packed = own.message(step, stage.send)
    arriving = call.buffers.take(stage.num_received, packed.shape[1], packed)
    pending = _exchange(call.mesh, (packed, stage.send_rank), (arriving, stage.recv_rank))
    held = [packed, arriving]  # emptied when taken, so that the block lives no longer than its tiles
    del packed, arriving

    def arrived() -> tuple[DeviceStep, Block]:
        pending.wait()
        message = held.pop()
        own.sent(step, held.pop())
        return stage, Block(*unpack(message, own.k, own.v), message)

    return arrived


def _send_to_owner(
    stage: DeviceStep, packed: Tensor, dk: GradientSum, dv: GradientSum, call: RingCall
) -> Callable[[], None]:
    """The mirror of `_start`: send gradients of the received rows to their owner; add those that arrive."""
    arriving = call.buffers.take(stage.num_sent, packed.shape[1], packed)
    pending = _exchange(call.mesh, (packed, stage.recv_rank), (arriving, stage.send_rank))
    held = [packed, arriving]
    del packed, arriving

    def add() -> None:
        pending.wait()
        arrived, sent = held.pop(), held.pop()
        if stage.num_sent:
            for total, part in zip((dk, dv), unpack(arrived, dk.like, dv.like), strict=True):
                total.add(part, stage.send, slice(None), is_first_write=False)
        call.buffers.give(sent, arrived)

    return add


def _exchange(mesh: UspMesh, send: tuple[Tensor, int], receive: tuple[Tensor, int]) -> P2PHandle:
    assert mesh.ring_group is not None
    ranks = mesh.ring_ranks
    return start_p2p(mesh.ring_group, [(send[0], ranks[send[1]])], [(receive[0], ranks[receive[1]])])


def _sink_gradient(dout_THE: Tensor, out_THE: Tensor, lse_HT: Tensor, sinks_H: Tensor | None) -> Tensor | None:
    """d loss / d sink = - sum over rows of (the sink's weight) x (dout . out)."""
    if sinks_H is None:
        return None
    delta_HT = (dout_THE.to(lse_HT.dtype) * out_THE).sum(-1).T
    return -((sinks_H.to(lse_HT.dtype)[:, None] - lse_HT).exp() * delta_HT).sum(-1).to(sinks_H.dtype)
