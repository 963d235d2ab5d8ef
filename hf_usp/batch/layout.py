"""The geometry of one sharded batch: which rank holds which token, and which tokens form a document.

A layout passes with the local batch through the model to every attention layer. It makes the schedule of each mask
once per batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..distributed.comm import all_reduce_sum
from ..distributed.mesh import UspMesh
from ..sharding.intervals import IntArray
from ..sharding.load_balance import assign_tokens, over_batch
from ..sharding.masks import UNLIMITED, Documents, Mask
from ..sharding.schedule import RingSchedule, make_ring_schedule
from ..utils.autograd import forbid_double_backward
from ..utils.tensors import opaque_to_fsdp
from .device_schedule import DeviceSchedule, make_device_schedule
from .documents import append_padding

Made = TypeVar("Made")


@dataclass(frozen=True)
class MaskSpec:
    """The mask that a layer asks for.

    Attributes:
        window_left: keys before the query that it sees; -1: no limit. `sliding_window` is window_left + 1.
        window_right: keys after the query that it sees; -1: no limit, 0: causal.
        chunk_size: tokens of a chunk outside of which nothing is seen (Llama 4); 0: no chunks.
        chunks_from_row_start: whether packed documents count chunks from the start of the row, not from their own
            start.
    """

    window_left: int = UNLIMITED
    window_right: int = 0
    chunk_size: int = 0
    chunks_from_row_start: bool = False


CAUSAL = MaskSpec()


@dataclass(frozen=True)
class AttentionShape:
    """One attention call, as it is counted.

    Attributes:
        mask_spec: its mask.
        heads: query heads.
        kv_heads: key and value heads.
        width: width of a query or key head.
        value_width: width of a value head.
        itemsize: bytes of an element.
    """

    mask_spec: MaskSpec
    heads: int
    kv_heads: int
    width: int
    value_width: int
    itemsize: int


@opaque_to_fsdp
@dataclass(eq=False)
class SequenceLayout:
    """Which rank holds which token of one batch.

    Attributes:
        mesh: the ranks.
        batch: rows of the batch.
        length: tokens of a row, as the caller passed them.
        padded: tokens of a row after padding that gives every rank equally many.
        order: name of the assignment of tokens to ring ranks.
        documents: documents of all rows, with the padding.
        shards: positions of a row that each ring rank holds.
        kernel: name of the kernel that was asked for; None: the best installed.
        calls: layers that have used this layout; recomputed layers count again.
        used: the same by shape.
        dtype: dtype of the last attention call.
        shifted: whether the caller passed `shift_labels`.
        manual_loop: whether `hf_usp.shard` made it for a hand-written loop, whose model has no hooks.
        pass_states: whether recurrent layers pass states (True) or exchange heads for tokens (False); None: the
            cheaper one.
        positions: function from a full batch without position_ids to its positions [B, S], or None.
        router_logits: whether the caller asked for `output_router_logits`.
        largest_position: whether positions have to carry the largest position of the batch.
    """

    mesh: UspMesh
    batch: int
    length: int
    padded: int
    order: str
    documents: Documents
    shards: list[IntArray] = field(default_factory=list, repr=False)
    kernel: str | None = None
    calls: int = 0
    used: Counter[AttentionShape] = field(default_factory=Counter, repr=False)
    dtype: torch.dtype = torch.float32
    shifted: bool = False
    manual_loop: bool = False
    pass_states: bool | None = None
    positions: Callable[[Mapping[str, Any]], Tensor | None] | None = None
    router_logits: bool = False
    largest_position: bool = True
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def local_length(self) -> int:
        """Tokens of a row on this rank (L)."""
        return self.padded // self.mesh.size

    def row_positions(self, ring_rank: int | None = None, ulysses_rank: int | None = None) -> IntArray:
        """Positions in a row, ascending, that a rank of the mesh holds [L]; this rank by default."""
        ring_rank = self.mesh.ring_rank if ring_rank is None else ring_rank
        ulysses_rank = self.mesh.ulysses_rank if ulysses_rank is None else ulysses_rank
        return np.split(self.shards[ring_rank], self.mesh.ulysses_degree)[ulysses_rank]

    def ring_schedule(self, mask_spec: MaskSpec = CAUSAL) -> RingSchedule:
        """The ring schedule of this rank for such a mask; made once."""

        def make() -> RingSchedule:
            shards = over_batch(self.shards, self.batch, self.padded)
            return make_ring_schedule(shards, self.mask(mask_spec), self.mesh.ring_rank, self.mesh.ring_per_node)

        return self.memoize(("ring_schedule", mask_spec), make)

    def mask(self, mask_spec: MaskSpec = CAUSAL) -> Mask:
        """The mask over the full batch, positions flattened.

        A window or chunk of all tokens is none; wider ones may not fit the integers of positions.
        """
        documents = self.documents
        most = documents.num_tokens
        if mask_spec.chunk_size:
            documents = documents.chunked(
                min(mask_spec.chunk_size, most), self.padded if mask_spec.chunks_from_row_start else 0
            )
        return Mask(documents, min(mask_spec.window_left, most), min(mask_spec.window_right, most))

    def device_schedule(self, mask_spec: MaskSpec, device: torch.device) -> DeviceSchedule:
        """The ring schedule on a device; made once."""
        return self.memoize(
            ("device_schedule", mask_spec, device), lambda: make_device_schedule(self.ring_schedule(mask_spec), device)
        )

    def positions_per_rank(self) -> IntArray:
        """Positions of every rank's tokens, flattened over the batch [P, B * L]."""
        mesh = self.mesh
        rows = np.stack([self.row_positions(*divmod(rank, mesh.ulysses_degree)) for rank in range(mesh.size)])
        offsets = np.arange(self.batch)[None, :, None] * self.padded
        return (rows[:, None] + offsets).reshape(mesh.size, -1)

    def memoize(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """The result of `make`, computed once for this batch."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def local_indices(self, device: torch.device) -> tuple[Tensor, int]:
        """Tokens of a full row that this rank takes [L], and how many of the last are padding of ours; made once.

        Padding repeats the last token of the row.
        """

        def make() -> tuple[Tensor, int]:
            positions = self.row_positions()
            index = torch.from_numpy(np.minimum(positions, self.length - 1)).to(device)
            return index, int((positions >= self.length).sum())

        return self.memoize(("local_indices", device), make)


def make_layout(
    documents: Documents,
    batch: int,
    length: int,
    mesh: UspMesh,
    order: str = "auto",
    mask_specs: tuple[MaskSpec, ...] = (CAUSAL,),
) -> SequenceLayout:
    """Layout of `batch` rows of `length` tokens; `documents` cover batch * length positions.

    order "auto" takes the order that suits the masks of `mask_specs`, one entry per layer (`assign_tokens`).
    """
    # Zigzag wants 2 chunks per ring rank, ulysses equal slices of each ring rank's tokens.
    unit = mesh.ring_degree * int(np.lcm(2 if mesh.ring_degree > 1 else 1, mesh.ulysses_degree))
    # To Transformers a share of one token is a step of generation, in which recurrent layers get no mask.
    least = 2 * mesh.size if mesh.size > 1 else 1
    padded = -(-max(length, least) // unit) * unit
    layout = SequenceLayout(mesh, batch, length, padded, order, append_padding(documents, batch, length, padded))
    masks = {mask_spec: layout.mask(mask_spec) for mask_spec in mask_specs}
    layout.order, layout.shards = assign_tokens(
        batch, padded, mesh.ring_degree, order, [masks[mask_spec] for mask_spec in mask_specs]
    )
    return layout


def take(full: Tensor, index: Tensor, layout: SequenceLayout, dim: int = 0) -> Tensor:
    """Entries `index` of a tensor that all ranks hold in full, with the gradient of one process on each of them."""
    if not (full.requires_grad and torch.is_grad_enabled()):
        return full.index_select(dim, index)
    return _Take.apply(full, index, layout, dim)


class _Take(torch.autograd.Function):
    """Each rank takes its entries. The adjoint is the mean over ranks of what their gradients say of the full tensor.

    The backward of a sharded loss multiplies by the number of ranks (`loss.py`), so the mean is the gradient of one
    process: right for a tensor whose gradient nobody averages, and for the parameters behind it, where the
    data-parallel average is one of equal gradients.
    """

    @staticmethod
    def forward(ctx: Any, full: Tensor, index: Tensor, layout: SequenceLayout, dim: int) -> Tensor:
        ctx.save_for_backward(index)
        ctx.mesh, ctx.dim, ctx.shape = layout.mesh, dim, full.shape
        return full.index_select(dim, index)

    @staticmethod
    @forbid_double_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        own = grads[0].new_zeros(ctx.shape).index_add_(ctx.dim, index, grads[0])
        return all_reduce_sum(own, ctx.mesh.group).div_(ctx.mesh.size), None, None, None
