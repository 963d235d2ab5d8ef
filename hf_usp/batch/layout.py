"""The geometry of one sharded batch: which rank holds which token, and which tokens form a document.

A layout never changes. It memoises what follows from it, such as the schedule of each mask. State that changes
during a forward is in its `ForwardContext` (`context.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from ..distributed.mesh import UspMesh
from ..sharding.intervals import IntArray
from ..sharding.load_balance import assign_tokens, over_batch
from ..sharding.masks import UNLIMITED, Documents, Mask
from ..sharding.schedule import RingSchedule, make_ring_schedule
from ..utils.tensors import opaque_to_fsdp
from ..utils.upload import upload
from .device_schedule import DeviceSchedule, make_device_schedule
from .documents import append_padding

Made = TypeVar("Made")


class MaskSpec(NamedTuple):
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

    def over(self, documents: Documents, row_length: int) -> Mask:
        """The mask over the documents of a batch whose rows have `row_length` tokens, positions flattened.

        A window or chunk of all tokens is none; wider ones may not fit the integers of positions.
        """
        most = documents.num_tokens
        if self.chunk_size:
            documents = documents.chunked(min(self.chunk_size, most), row_length if self.chunks_from_row_start else 0)
        return Mask(documents, min(self.window_left, most), min(self.window_right, most))


CAUSAL = MaskSpec()


@dataclass(frozen=True)
class KeptTokens:
    """Some tokens of every row, by who holds them.

    Attributes:
        local: this rank's of them, as indices of its tokens [K of this rank].
        places: of each kept token its place among all ranks' padded lists [K].
        most: entries of a padded list.
    """

    local: Tensor
    places: Tensor
    most: int


@opaque_to_fsdp
@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """Which rank holds which token of one batch. `hf_usp.shard(batch, mesh)["usp"]` is one.

    Attributes:
        mesh: the ranks.
        batch: rows of the batch.
        length: tokens of a row, as the caller passed them.
        padded: tokens of a row after padding that gives every rank equally many.
        order: name of the assignment of tokens to ring ranks.
        documents: documents of all rows, with the padding.
        shards: positions of a row that each ring rank holds.
        kernel: name of the kernel that was asked for; None: the best installed.
    """

    mesh: UspMesh
    batch: int
    length: int
    padded: int
    order: str
    documents: Documents
    shards: tuple[IntArray, ...] = field(repr=False)
    kernel: str | None = None
    _memo: dict[Hashable, object] = field(default_factory=dict, init=False, repr=False)

    @property
    def local_length(self) -> int:
        """Tokens of a row on this rank (L)."""
        return self.padded // self.mesh.size

    def row_positions(self, ring_rank: int | None = None, ulysses_rank: int | None = None) -> IntArray:
        """Positions in a row, ascending, that a rank of the mesh holds [L]; this rank by default."""
        ring_rank = self.mesh.ring_rank if ring_rank is None else ring_rank
        ulysses_rank = self.mesh.ulysses_rank if ulysses_rank is None else ulysses_rank
        return np.split(self.shards[ring_rank], self.mesh.ulysses_degree)[ulysses_rank]

    def ring_shards(self) -> list[IntArray]:
        """Positions of every ring rank's tokens, flattened over the batch, ascending."""
        return over_batch(self.shards, self.batch, self.padded)

    def ring_schedule(self, mask_spec: MaskSpec = CAUSAL, ring_rank: int | None = None) -> RingSchedule:
        """The ring schedule of a ring rank for such a mask; this rank by default. Made once."""
        rank = self.mesh.ring_rank if ring_rank is None else ring_rank
        return self.memoize(
            ("ring_schedule", mask_spec, rank),
            lambda: make_ring_schedule(self.ring_shards(), self.mask(mask_spec), rank, self.mesh.ring_per_node),
        )

    def mask(self, mask_spec: MaskSpec = CAUSAL) -> Mask:
        """The mask over the full batch, positions flattened."""
        return mask_spec.over(self.documents, self.padded)

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
        """The result of `make`, which follows from the layout alone; computed once."""
        if key not in self._memo:
            self._memo[key] = make()
        return cast(Made, self._memo[key])

    def local_indices(self, device: torch.device) -> tuple[Tensor, int]:
        """Tokens of a full row that this rank takes [L], and how many of the last are padding of ours; made once.

        Padding repeats the last token of the row.
        """

        def make() -> tuple[Tensor, int]:
            positions = self.row_positions()
            (index,) = upload([np.minimum(positions, self.length - 1)], device)
            return index, int((positions >= self.length).sum())

        return self.memoize(("local_indices", device), make)


def make_layout(
    documents: Documents,
    batch: int,
    length: int,
    mesh: UspMesh,
    order: str = "auto",
    mask_specs: tuple[MaskSpec, ...] = (CAUSAL,),
    kernel: str | None = None,
) -> SequenceLayout:
    """Layout of `batch` rows of `length` tokens; `documents` cover batch * length positions.

    order "auto" takes the order that suits the masks of `mask_specs`, one entry per layer (`assign_tokens`).
    """
    # Zigzag wants 2 chunks per ring rank, ulysses equal slices of each ring rank's tokens.
    unit = mesh.ring_degree * int(np.lcm(2 if mesh.ring_degree > 1 else 1, mesh.ulysses_degree))
    # To Transformers a share of one token is a step of generation, in which recurrent layers get no mask.
    least = 2 * mesh.size if mesh.size > 1 else 1
    padded = -(-max(length, least) // unit) * unit
    documents = append_padding(documents, batch, length, padded)
    masks = {mask_spec: mask_spec.over(documents, padded) for mask_spec in mask_specs}
    order, shards = assign_tokens(
        batch, padded, mesh.ring_degree, order, [masks[mask_spec] for mask_spec in mask_specs]
    )
    return SequenceLayout(mesh, batch, length, padded, order, documents, tuple(shards), kernel)


def locate_tokens(positions_K: IntArray, layout: SequenceLayout, device: torch.device) -> KeptTokens:
    """Who holds the tokens at these positions of a row; positions may come in any order, and twice."""
    held = layout.positions_per_rank()[:, : layout.local_length]  # of the first row
    at = np.empty(layout.padded, dtype=np.int64)
    at[held.reshape(-1)] = np.arange(layout.padded)
    owners, rows = np.divmod(at[positions_K], layout.local_length)
    counts = np.bincount(owners, minlength=layout.mesh.size)
    order = np.argsort(owners, kind="stable")
    nth = np.empty_like(order)
    nth[order] = np.arange(len(order)) - np.repeat(counts.cumsum() - counts, counts)
    most = int(counts.max())
    local, places = rows[owners == layout.mesh.rank], owners * most + nth
    on_device = upload([local, places], device)
    return KeptTokens(on_device[0], on_device[1], most)
