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
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..batch.context import AttentionShape
from ..distributed.comm import all_to_all
from ..distributed.mesh import UspMesh
from ..kernels import accumulation_dtype
from ..sharding.heads import HeadShare


@dataclass(frozen=True, eq=False)
class Heads:
    """Which ulysses rank has which heads of a call. Made once for all layers of a batch that are alike.

    Attributes:
        shares: shares[u]: heads of ulysses rank u.
        mesh: the ranks.
        batch: rows.
        shape: of the call before the exchange.
        mine: heads of this rank.
        columns: columns[u]: columns of q, k and v in a message to ulysses rank u.
        others: where the other ranks are in a list without this one, and in the list of all; twice where this one is
            between them.
        copies: of q, k and v, how many ranks get each head, where every rank gets equally many in order; None: some
            share is larger than another.
    """

    shares: Sequence[HeadShare]
    mesh: UspMesh
    batch: int
    shape: AttentionShape
    mine: HeadShare = field(init=False)
    columns: list[list[int]] = field(init=False)
    others: list[tuple[slice, slice]] = field(init=False)
    copies: tuple[int, int, int] | None = field(init=False)

    def __post_init__(self) -> None:
        width, value_width = self.shape.width, self.shape.value_width
        columns = [[s.num_query * width, s.num_kv * width, s.num_kv * value_width] for s in self.shares]
        of_q = _copies([(s.q0, s.q1) for s in self.shares], self.shape.heads)
        of_kv = _copies([(s.k0, s.k1) for s in self.shares], self.shape.kv_heads)
        me, last = self.mesh.ulysses_rank, self.mesh.ulysses_degree - 1
        sides = [(slice(0, me), slice(0, me))] * (me > 0) + [(slice(me, last), slice(me + 1, last + 1))] * (me < last)
        object.__setattr__(self, "mine", self.shares[me])
        object.__setattr__(self, "others", sides)
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "copies", (of_q, of_kv, of_kv) if of_q and of_kv else None)

    def split(self, packed: Tensor, ulysses_rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Views [..., heads, width] on q, k and v of a message [..., X] to this rank."""
        share, shape, before = self.shares[ulysses_rank], self.shape, packed.shape[:-1]
        q, k, v = packed.split_with_sizes(self.columns[ulysses_rank], dim=-1)
        return (
            q.view(*before, share.num_query, shape.width),
            k.view(*before, share.num_kv, shape.width),
            v.view(*before, share.num_kv, shape.value_width),
        )


def _copies(spans: Sequence[tuple[int, int]], number: int) -> int:
    """How many ranks get each of `number` heads, if rank u gets `spans[u]`; 0 where spans are not equal and in order.

    >>> _copies([(0, 2), (2, 4)], 4), _copies([(0, 1), (0, 1), (1, 2), (1, 2)], 2), _copies([(0, 2), (2, 3)], 3)
    (1, 2, 0)
    """
    size = spans[0][1] - spans[0][0]
    copies = len(spans) * size // number
    even = copies and all(span == (u // copies * size, (u // copies + 1) * size) for u, span in enumerate(spans))
    return copies if even else 0


def gather_seq_scatter_heads(q_BLHD: Tensor, k_BLGD: Tensor, v_BLGE: Tensor, heads: Heads) -> Tensor | None:
    """The heads of this rank's share over all tokens of the ring shard, packed_TX (see `Heads.split`).

    None where ulysses has one rank: queries, keys and values stay what they are.
    """
    if heads.mesh.ulysses_group is None:
        return None
    return _to_tokens((q_BLHD, k_BLGD, v_BLGE), heads)


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
    columns = [sum(of) for of in heads.columns]
    length = len(grads[0]) // (batch * mesh.ulysses_degree)
    message_UBLX = grads[0].new_empty(mesh.ulysses_degree - 1, batch, length, columns[me], dtype=dtype)
    totals = []
    for which, piece_UBLhD in enumerate(heads.split(message_UBLX, me)):
        part_BULhD = grads.pop(0).unflatten(0, (batch, mesh.ulysses_degree, -1))
        by_peer = part_BULhD.transpose(0, 1)
        for without_me, peers in heads.others:
            piece_UBLhD[without_me].copy_(by_peer[peers])
        totals.append(_FullGradient(part_BULhD[:, me], heads, which, dtype))
        del part_BULhD, by_peer  # the last of this gradient
    if heads.copies is not None:
        sizes = [int(u != me) for u in range(mesh.ulysses_degree)]
        received_UBLX = all_to_all(message_UBLX, sizes, sizes, mesh.ulysses_group)
        for total, part_UBLhD in zip(totals, heads.split(received_UBLX, me), strict=True):
            total.add_others(part_UBLhD)
    else:
        sent = [0 if u == me else batch * length * columns[me] for u in range(mesh.ulysses_degree)]
        sizes = [0 if u == me else batch * length * columns[u] for u in range(mesh.ulysses_degree)]
        received = all_to_all(message_UBLX.view(-1), sent, sizes, mesh.ulysses_group).split(sizes)
        for u, share in enumerate(heads.shares):
            if u != me:
                parts = heads.split(received[u].view(batch, length, columns[u]), u)
                for total, part in zip(totals, parts, strict=True):
                    total.add(part, share)
    dq, dk, dv = (total.tensor.to(dtype) for total in totals)
    return dq, dk, dv


class _FullGradient:
    """Gradient of all heads of q, k or v (`which`) [B, L, heads, width], gathered from those of every ulysses rank.

    Starts with this rank's own. kv heads that several ranks read are summed in fp32.
    """

    def __init__(self, own: Tensor, heads: Heads, which: int, dtype: torch.dtype) -> None:
        self.which, self.heads = which, heads
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

    def add_others(self, parts_UBLhD: Tensor) -> None:
        """Those of all other ranks, whose shares are equal."""
        shares = [share for share in self.heads.shares if share is not self.heads.mine]
        if self.shared or len(shares) == 1:
            for part, share in zip(parts_UBLhD, shares, strict=True):
                self.add(part, share)
            return
        by_rank = self.tensor.unflatten(2, (len(shares) + 1, -1)).permute(2, 0, 1, 3, 4)
        for without_me, peers in self.heads.others:
            by_rank[peers].copy_(parts_UBLhD[without_me])


def gather_heads_scatter_seq(out_ThE: Tensor, heads: Heads) -> Tensor:
    """out_BLHE: all heads over this rank's tokens; the inverse of `gather_seq_scatter_heads` for the output."""
    if heads.mesh.ulysses_group is None:
        return out_ThE.unflatten(0, (heads.batch, -1))
    batch, degree, width = heads.batch, heads.mesh.ulysses_degree, out_ThE.shape[2]
    # For one row the tokens of a rank are one block already.
    message_UBLX = out_ThE.flatten(1).unflatten(0, (batch, degree, -1)).transpose(0, 1).contiguous()
    if heads.copies is not None:
        received_UBLX = all_to_all(message_UBLX, [1] * degree, [1] * degree, heads.mesh.ulysses_group)
        # One head a rank would be a view without a copy; models view the output as [B, L, H * E].
        return received_UBLX.unflatten(3, (-1, width)).permute(1, 2, 0, 3, 4).flatten(2, 3).contiguous()
    length = message_UBLX.shape[2]
    sizes = [batch * length * share.num_query * width for share in heads.shares]
    sent = [batch * length * heads.mine.num_query * width] * degree
    received = all_to_all(message_UBLX.view(-1), sent, sizes, heads.mesh.ulysses_group)
    blocks_BLX = [block.view(batch, length, -1) for block in received.split(sizes)]
    return torch.cat(blocks_BLX, dim=2).unflatten(2, (-1, width))


def gather_heads_scatter_seq_backward(dout_BLHE: Tensor, heads: Heads) -> Tensor:
    """dout_ThE: the heads of this rank's share over all tokens of the ring shard."""
    if heads.mesh.ulysses_group is None:
        return dout_BLHE.flatten(0, 1)
    return _to_tokens((dout_BLHE,), heads).unflatten(1, (heads.mine.num_query, dout_BLHE.shape[3]))


def _to_tokens(tensors: tuple[Tensor, ...], heads: Heads) -> Tensor:
    """Send every rank its heads of q, k and v (or of the output alone) side by side; returns packed_TX."""
    mesh = heads.mesh
    assert mesh.ulysses_group is not None
    degree, (batch, length) = mesh.ulysses_degree, tensors[0].shape[:2]
    widths = [x.shape[3] for x in tensors]
    columns = [
        [(s.num_kv if which else s.num_query) * width for which, width in enumerate(widths)] for s in heads.shares
    ]
    own = sum(columns[mesh.ulysses_rank])
    if heads.copies is not None:
        message_UBLX = tensors[0].new_empty(degree, batch, length, own)
        pieces = message_UBLX.split_with_sizes(columns[0], dim=3)
        for piece_UBLX, x_BLHD, copies in zip(pieces, tensors, heads.copies, strict=False):
            by_rank = x_BLHD.unflatten(2, (degree // copies, -1)).permute(2, 0, 1, 3, 4)
            piece = piece_UBLX.view(degree // copies, copies, batch, length, *by_rank.shape[3:])
            piece.copy_(by_rank.unsqueeze(1))
        packed_UBLX = all_to_all(message_UBLX, [1] * degree, [1] * degree, mesh.ulysses_group)
    else:
        sizes = [batch * length * sum(of) for of in columns]
        message = tensors[0].new_empty(sum(sizes))
        for block, of, s in zip(message.split(sizes), columns, heads.shares, strict=True):
            pieces = block.view(batch, length, -1).split_with_sizes(of, dim=2)
            for which, (piece_BLX, x_BLHD) in enumerate(zip(pieces, tensors, strict=True)):
                mine = x_BLHD[:, :, s.k0 : s.k1] if which else x_BLHD[:, :, s.q0 : s.q1]
                piece_BLX.view(mine.shape).copy_(mine)
        received = all_to_all(message, sizes, [batch * length * own] * degree, mesh.ulysses_group)
        packed_UBLX = received.view(degree, batch, length, own)
    return packed_UBLX.transpose(0, 1).reshape(degree * batch * length, own)
