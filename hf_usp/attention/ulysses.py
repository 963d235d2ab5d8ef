"""The ulysses exchange: scatter heads, gather tokens, and back (DeepSpeed-Ulysses, arXiv 2309.14509).

Shape suffixes: B batch, U ulysses ranks, L local tokens of a row, T = B * U * L tokens of the ring shard in ascending
order, H query heads, G kv heads, D key width, E value width, X all columns of a message (q, k, v side by side); lower
case h, g: the heads that this rank keeps.

q, k and v are sent in one message, the output in another; the backward mirrors both. Any number of heads: rank u keeps
the heads of `shares[u]`, and a kv head is sent once to every rank that reads it. For B = 1 what arrives already is
[T, X]: q, k and v are views into the message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch.context import AttentionShape
from ..distributed.comm import all_to_all
from ..distributed.mesh import UspMesh
from ..kernels import accumulation_dtype
from ..sharding.heads import HeadShare


@dataclass(frozen=True, eq=False)
class Heads:
    """Which ulysses rank has which heads of a call.

    Attributes:
        shares: shares[u]: heads of ulysses rank u.
        mesh: the ranks.
        batch: rows.
        shape: of the call before the exchange.
    """

    shares: Sequence[HeadShare]
    mesh: UspMesh
    batch: int
    shape: AttentionShape

    @property
    def mine(self) -> HeadShare:
        return self.shares[self.mesh.ulysses_rank]

    def columns(self, share: HeadShare) -> list[int]:
        """Columns of q, k and v in a message to the rank with this share."""
        width, value_width = self.shape.width, self.shape.value_width
        return [share.num_query * width, share.num_kv * width, share.num_kv * value_width]

    def split(self, packed: Tensor, share: HeadShare) -> tuple[Tensor, Tensor, Tensor]:
        """Views [..., heads, width] on q, k and v of a message [..., X]."""
        q, k, v = packed.split(self.columns(share), dim=-1)
        return (
            q.unflatten(-1, (share.num_query, self.shape.width)),
            k.unflatten(-1, (share.num_kv, self.shape.width)),
            v.unflatten(-1, (share.num_kv, self.shape.value_width)),
        )


def gather_seq_scatter_heads(q_BLHD: Tensor, k_BLGD: Tensor, v_BLGE: Tensor, heads: Heads) -> Tensor | None:
    """The heads of this rank's share over all tokens of the ring shard, packed_TX (see `Heads.split`).

    None where ulysses has one rank: queries, keys and values stay what they are.
    """
    if heads.mesh.ulysses_group is None:
        return None
    sent = [(q_BLHD[:, :, s.q0 : s.q1], k_BLGD[:, :, s.k0 : s.k1], v_BLGE[:, :, s.k0 : s.k1]) for s in heads.shares]
    return _to_tokens(sent, sum(heads.columns(heads.mine)), heads.mesh)


def gather_seq_scatter_heads_backward(
    grads: list[Tensor], heads: Heads, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """dq_BLHD, dk_BLGD, dv_BLGE in `dtype` from dq_ThD, dk_TgD, dv_TgE in the dtype that they were summed in.

    Gradients of this rank's own tokens never enter the message, and casting is part of the one copy into it. `grads`
    is emptied one by one, so that their memory is free for what is made of them.
    """
    mesh, batch, me = heads.mesh, heads.batch, heads.mesh.ulysses_rank
    if mesh.ulysses_group is None:
        dq, dk, dv = (x.to(dtype).unflatten(0, (batch, -1)) for x in grads)
        return dq, dk, dv
    columns = [sum(heads.columns(share)) for share in heads.shares]
    length = len(grads[0]) // (batch * mesh.ulysses_degree)
    message_UBLX = grads[0].new_empty(mesh.ulysses_degree - 1, batch, length, columns[me], dtype=dtype)
    totals = []
    for which, piece_UBLhD in enumerate(heads.split(message_UBLX, heads.mine)):
        part_BULhD = grads.pop(0).unflatten(0, (batch, mesh.ulysses_degree, -1))
        by_peer = part_BULhD.transpose(0, 1)
        piece_UBLhD[:me].copy_(by_peer[:me])
        piece_UBLhD[me:].copy_(by_peer[me + 1 :])
        totals.append(_Whole(part_BULhD[:, me], heads, which, dtype))
        del part_BULhD, by_peer  # the last of this gradient
    sent = [0 if u == me else message_UBLX[0].numel() for u in range(mesh.ulysses_degree)]
    sizes = [0 if u == me else batch * length * columns[u] for u in range(mesh.ulysses_degree)]
    received = all_to_all(message_UBLX.view(-1), sent, sizes, mesh.ulysses_group).split(sizes)
    for u, share in enumerate(heads.shares):
        if u != me:
            for total, part in zip(
                totals, heads.split(received[u].view(batch, length, columns[u]), share), strict=True
            ):
                total.add(part, share)
    dq, dk, dv = (total.tensor.to(dtype) for total in totals)
    return dq, dk, dv


class _Whole:
    """Gradient of all heads of q, k or v (`which`) [B, L, heads, width], gathered from those of every ulysses rank.

    Starts with this rank's own. kv heads that several ranks read are summed in fp32.
    """

    def __init__(self, own: Tensor, heads: Heads, which: int, dtype: torch.dtype) -> None:
        self.which = which
        number = heads.shape.kv_heads if which else heads.shape.heads
        self.shared = sum(share.num_kv if which else share.num_query for share in heads.shares) > number
        shape = (*own.shape[:2], number, own.shape[3])
        if self.shared:
            self.tensor = own.new_zeros(shape, dtype=accumulation_dtype(dtype))
        else:
            self.tensor = own.new_empty(shape, dtype=dtype)
        self.add(own, heads.mine)

    def add(self, part: Tensor, share: HeadShare) -> None:
        at = self.tensor[:, :, share.k0 : share.k1] if self.which else self.tensor[:, :, share.q0 : share.q1]
        if self.shared:
            at.add_(part)
        else:
            at.copy_(part)


def gather_heads_scatter_seq(out_ThE: Tensor, heads: Heads) -> Tensor:
    """out_BLHE: all heads over this rank's tokens; the inverse of `gather_seq_scatter_heads` for the output."""
    if heads.mesh.ulysses_group is None:
        return out_ThE.unflatten(0, (heads.batch, -1))
    batch, degree, width = heads.batch, heads.mesh.ulysses_degree, out_ThE.shape[2]
    # For one row the tokens of a rank are one block already.
    message_UBLX = out_ThE.flatten(1).unflatten(0, (batch, degree, -1)).transpose(0, 1).contiguous()
    length = message_UBLX.shape[2]
    sizes = [batch * length * share.num_query * width for share in heads.shares]
    sent = [message_UBLX[0].numel()] * degree
    received = all_to_all(message_UBLX.view(-1), sent, sizes, heads.mesh.ulysses_group)
    blocks_BLX = [block.view(batch, length, -1) for block in received.split(sizes)]
    return torch.cat(blocks_BLX, dim=2).unflatten(2, (-1, width))


def gather_heads_scatter_seq_backward(dout_BLHE: Tensor, heads: Heads) -> Tensor:
    """dout_ThE: the heads of this rank's share over all tokens of the ring shard."""
    if heads.mesh.ulysses_group is None:
        return dout_BLHE.flatten(0, 1)
    width = dout_BLHE.shape[3]
    sent = [(dout_BLHE[:, :, s.q0 : s.q1],) for s in heads.shares]
    packed_TX = _to_tokens(sent, heads.mine.num_query * width, heads.mesh)
    return packed_TX.unflatten(1, (heads.mine.num_query, width))


def _to_tokens(sent: Sequence[tuple[Tensor, ...]], columns: int, mesh: UspMesh) -> Tensor:
    """Send rank u the tensors [B, L, heads, width] of `sent[u]` side by side; returns packed_TX, X = `columns`."""
    assert mesh.ulysses_group is not None
    batch, length = sent[0][0].shape[:2]
    sizes = [sum(x.numel() for x in tensors) for tensors in sent]
    message = sent[0][0].new_empty(sum(sizes))
    for block, tensors in zip(message.split(sizes), sent, strict=True):
        pieces = block.view(batch, length, -1).split([x.shape[2] * x.shape[3] for x in tensors], dim=2)
        for piece, x in zip(pieces, tensors, strict=True):
            piece.unflatten(2, x.shape[2:]).copy_(x)
    share = batch * length * columns
    received = all_to_all(message, sizes, [share] * mesh.ulysses_degree, mesh.ulysses_group)
    packed_UBLX = received.view(mesh.ulysses_degree, batch, length, columns)
    return packed_UBLX.transpose(0, 1).reshape(mesh.ulysses_degree * batch * length, columns)
