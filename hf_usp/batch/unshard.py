"""From local tensors to a full tensor: the inverse of `hf_usp.shard`, and its gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distributed.comm import all_gather, all_to_all
from ..distributed.mesh import UspMesh
from ..errors import UspBatchError
from ..kernels import accumulation_dtype
from ..utils.autograd import forbid_double_backward
from .layout import KeptTokens, SequenceLayout


def unshard(tensor: Tensor, layout: SequenceLayout, dim: int = 1) -> Tensor:
    """The full tensor, in the original order and without our padding, from every rank's share along `dim`.

    The inverse of `hf_usp.shard`. Differentiable: every rank's gradient of its full tensor counts,
    so with the same loss on all ranks gradients are right after the data-parallel average over ranks.
    """
    if layout.mesh.size == 1:
        return tensor
    if tensor.shape[dim] != layout.local_length:
        raise UspBatchError(
            f"unshard of a tensor of shape {tuple(tensor.shape)} along dim {dim}",
            rule=f"dim {dim} is this rank's share of the sequence, {layout.local_length} tokens",
            remedy="pass dim=..., the dim of the sequence",
        )
    places = _where_from(layout, tensor.device)
    return _Unshard.apply(tensor, places, layout.local_length, layout.mesh, dim)


def unshard_kept(tensor: Tensor, kept: KeptTokens, layout: SequenceLayout) -> Tensor:
    """Kept tokens [B, K, ...] of all ranks, in the order in which they were asked for, from those of this rank.

    Its gradient is that of `unshard`.
    """
    if kept.most == 0:
        return tensor
    empty = tensor.new_zeros(len(tensor), kept.most - tensor.shape[1], *tensor.shape[2:])
    return _Unshard.apply(torch.cat([tensor, empty], dim=1), kept.places, kept.most, layout.mesh, 1)


class _Unshard(torch.autograd.Function):
    """All-gather along the sequence; its adjoint sums what every rank's gradient says of this rank's share."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, places: Tensor, each: int, mesh: UspMesh, dim: int) -> Tensor:
        ctx.places, ctx.each, ctx.mesh, ctx.dim = places, each, mesh, dim
        assert mesh.group is not None
        shares = torch.cat(list(all_gather(tensor, mesh.group)), dim=dim)
        return shares.index_select(dim, places)

    @staticmethod
    @forbid_double_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        mesh, dim = ctx.mesh, ctx.dim
        shape = list(grads[0].shape)
        shape[dim] = ctx.each * mesh.size
        ordered = grads[0].new_zeros(shape).index_copy_(dim, ctx.places, grads[0])
        blocks = torch.stack(ordered.chunk(mesh.size, dim))
        sizes = [blocks[0].numel()] * mesh.size
        received = all_to_all(blocks.view(-1), sizes, sizes, mesh.group).view_as(blocks)
        return received.sum(0, dtype=accumulation_dtype(received.dtype)).to(received.dtype), None, None, None, None


def _where_from(layout: SequenceLayout, device: torch.device) -> Tensor:
    """For each position of a row its place in the concatenation of all ranks' shares [S]."""

    def make() -> Tensor:
        held = layout.positions_per_rank()[:, : layout.local_length]  # of the first row
        return torch.from_numpy(np.argsort(held.reshape(-1))[: layout.length].copy()).to(device)

    return layout.memoize(("where_from", device), make)
