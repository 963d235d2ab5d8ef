"""The ulysses exchange: give away heads, receive tokens, and back (DeepSpeed-Ulysses, arXiv 2309.14509).

Shape suffixes: B batch, U ulysses ranks, L local tokens of a row, T = B * U * L tokens of the ring shard in ascending
order, H query heads, G kv heads, D key width, E value width, X all columns of a message (q, k, v side by side); lower
case h, g: the heads that this rank keeps.

q, k and v travel in one message, the output in another; the backward mirrors both. Any number of heads: rank u keeps
the heads of `shares[u]`, and a kv head travels once to every rank that reads it. For B = 1 what arrives already is
[T, X]: q, k and v are views into the message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .comm import all_to_all
from .degrees import HeadShare
from .kernels import accumulation_dtype
from .mesh import UspMesh


@dataclass(frozen=True, eq=False)
class Heads:
    """Who keeps which heads of a call: rank u those of `shares[u]`.

    batch: rows. query_heads, kv_heads: their numbers before the exchange (H, G). width, value_width: D, E.
    """

    shares: Sequence[HeadShare]
    mesh: UspMesh
    batch: int
    query_heads: int
    kv_heads: int
    width: int
    value_width: int

    @property
    def mine(self) -> HeadShare:
        return self.shares[self.mesh.ulysses_rank]

    def columns(self, share: HeadShare) -> list[int]:
        """Columns of q, k and v in a message to the rank with this share."""
        return [share.num_query * self.width, share.num_kv * self.width, share.num_kv * self.value_width]

    def split(self, packed: Tensor, share: HeadShare) -> tuple[Tensor, Tensor, Tensor]:
        """Views [..., heads, width] on q, k and v of a message [..., X]."""
        q, k, v = packed.split(self.columns(share), dim=-1)
        return (
            q.unflatten(-1, (share.num_query, self.width)),
            k.unflatten(-1, (share.num_kv, self.width)),
            v.unflatten(-1, (share.num_kv, self.value_width)),
        )


def heads_to_tokens(q_BLHD: Tensor, k_BLGD: Tensor, v_BLGE: Tensor, heads: Heads) -> Tensor | None:
    """The heads of this rank's share over all tokens of the ring shard, packed_TX (see `Heads.split`).

    None where ulysses has one rank: queries, keys and values stay what they are.
    """
    if heads.mesh.ulysses_group is None:
        return None
    sent = [(q_BLHD[:, :, s.q0 : s.q1], k_BLGD[:, :, s.k0 : s.k1], v_BLGE[:, :, s.k0 : s.k1]) for s in heads.shares]
    return _to_tokens(sent, sum(heads.columns(heads.mine)), heads.mesh)


def heads_to_tokens_backward(grads: Sequence[Tensor], heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """dq_BLHD, dk_BLGD, dv_BLGE from dq_ThD, dk_TgD, dv_TgE."""
    if heads.mesh.ulysses_group is None:
        dq, dk, dv = (x.unflatten(0, (heads.batch, -1)) for x in grads)
        return dq, dk, dv
    blocks_BLX = _to_heads(grads, heads.batch, [sum(heads.columns(s)) for s in heads.shares], heads.mesh)
    parts = [heads.split(block, share) for block, share in zip(blocks_BLX, heads.shares, strict=True)]
    dq = torch.cat([part[0] for part in parts], dim=2)
    dk, dv = (_sum_shared([part[i] for part in parts], heads.shares, heads.kv_heads) for i in (1, 2))
    return dq, dk, dv


def tokens_to_heads(out_ThE: Tensor, heads: Heads) -> Tensor:
    """out_BLHE: all heads over this rank's tokens; the inverse of `heads_to_tokens` for the output."""
    if heads.mesh.ulysses_group is None:
        return out_ThE.unflatten(0, (heads.batch, -1))
    width = out_ThE.shape[2]
    blocks_BLX = _to_heads((out_ThE,), heads.batch, [s.num_query * width for s in heads.shares], heads.mesh)
    return torch.cat(blocks_BLX, dim=2).unflatten(2, (-1, width))


def tokens_to_heads_backward(dout_BLHE: Tensor, heads: Heads) -> Tensor:
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


def _to_heads(tensors: Sequence[Tensor], batch: int, columns: Sequence[int], mesh: UspMesh) -> list[Tensor]:
    """The way back: `tensors` [T, heads, width] side by side, cut by tokens; rank u's block is [B, L, columns[u]]."""
    assert mesh.ulysses_group is not None
    degree, tokens = mesh.ulysses_degree, tensors[0].shape[0]
    length = tokens // (batch * degree)
    widths = [x.shape[1] * x.shape[2] for x in tensors]
    if len(tensors) == 1 and batch == 1:
        message = tensors[0].contiguous()
    else:
        message = tensors[0].new_empty(degree, batch, length, sum(widths))
        for piece, x in zip(message.split(widths, dim=3), tensors, strict=True):
            # [U, B, L, heads, width] <- [B, U, L, heads, width]
            piece.unflatten(3, x.shape[1:]).copy_(x.unflatten(0, (batch, degree, length)).transpose(0, 1))
    sizes = [batch * length * c for c in columns]
    received = all_to_all(message.view(-1), [message.numel() // degree] * degree, sizes, mesh.ulysses_group)
    return [block.view(batch, length, c) for block, c in zip(received.split(sizes), columns, strict=True)]


def _sum_shared(parts: Sequence[Tensor], shares: Sequence[HeadShare], kv_heads: int) -> Tensor:
    """Gradient of all kv heads [B, L, G, width] from those of the ranks that read them, shared heads summed in fp32."""
    if sum(share.num_kv for share in shares) == kv_heads:
        return torch.cat(list(parts), dim=2)
    first = parts[0]
    total = first.new_zeros(*first.shape[:2], kv_heads, first.shape[3], dtype=accumulation_dtype(first.dtype))
    for part, share in zip(parts, shares, strict=True):
        total[:, :, share.k0 : share.k1] += part
    return total.to(first.dtype)
