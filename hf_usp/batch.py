"""Cutting a full batch into this rank's share (`unshard` puts shares together again).

Shape suffixes: B rows, S tokens of a full row, L tokens of a row on this rank.

`Layout` says in integers who holds which token and which tokens form a document. It travels with the share, through the
model, to every attention layer, and makes each mask's plan once per batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .comm import all_reduce_sum
from .errors import UspBatchError
from .integers.dealing import deal_row
from .integers.layout import UNLIMITED, Documents, IntArray, Mask, over_batch
from .integers.plan import RingPlan, make_plan
from .mesh import UspMesh
from .once import differentiated_once
from .passing import passed_on
from .work import Work, prepare

Made = TypeVar("Made")


@dataclass(frozen=True)
class MaskKind:
    """What a layer asks for: limits to the left and right of the diagonal (-1: none), chunk size (0: none).

    by_row: whether packed documents count their chunks from the start of the row instead of their own.
    """

    left: int = UNLIMITED
    right: int = 0
    chunk: int = 0
    by_row: bool = False


CAUSAL = MaskKind()


@dataclass(frozen=True)
class CallShape:
    """One attention call: its mask, heads, widths of keys and values, and bytes of an element."""

    kind: MaskKind
    heads: int
    kv_heads: int
    width: int
    value_width: int
    itemsize: int


@passed_on
@dataclass(eq=False)
class Layout:
    """Who holds which token of one batch.

    mesh: the ranks. batch, length: rows and tokens per row as the caller passed them. padded: tokens per row after ours
    were appended so that every rank holds equally many. order: name of the assignment of tokens to ring ranks. shards:
    positions of a row that each ring rank holds. kernel: the one asked for by name, or None. calls: how many layers
    have used this layout, recomputed ones again; used: the same by shape; dtype: what attention last computed in.
    shifted: whether the caller passed `shift_labels`; router_logits: whether those were asked for. by_hand: whether
    `hf_usp.shard` made it for a hand-written loop, whose model nobody prepared.
    pass_states: whether recurrent layers pass states between ranks or exchange heads for tokens, where they can do
    both; None: what costs less. positions: of a full batch that has no position_ids [B, S], or None.
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
    used: Counter[CallShape] = field(default_factory=Counter, repr=False)
    dtype: torch.dtype = torch.float32
    shifted: bool = False
    by_hand: bool = False
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

    def plan(self, kind: MaskKind = CAUSAL) -> RingPlan:
        """What this rank computes and sends for such a mask; made once."""

        def make() -> RingPlan:
            shards = over_batch(self.shards, self.batch, self.padded)
            return make_plan(shards, self.mask(kind), self.mesh.ring_rank, self.mesh.ring_per_node)

        return self.once(("plan", kind), make)

    def mask(self, kind: MaskKind = CAUSAL) -> Mask:
        """The mask over the whole batch, positions flattened.

        A window or chunk of all tokens is none; wider ones may not fit the integers of positions.
        """
        documents = self.documents
        most = documents.num_tokens
        if kind.chunk:
            documents = documents.chunked(min(kind.chunk, most), self.padded if kind.by_row else 0)
        return Mask(documents, min(kind.left, most), min(kind.right, most))

    def work(self, kind: MaskKind, device: torch.device) -> Work:
        """The plan on a device; made once."""
        return self.once(("work", kind, device), lambda: prepare(self.plan(kind), device))

    def held(self) -> IntArray:
        """Positions of every rank's tokens, flattened over the batch [P, B * L]."""
        mesh = self.mesh
        rows = np.stack([self.row_positions(*divmod(rank, mesh.ulysses_degree)) for rank in range(mesh.size)])
        offsets = np.arange(self.batch)[None, :, None] * self.padded
        return (rows[:, None] + offsets).reshape(mesh.size, -1)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` returns, made once for this batch."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def taken(self, device: torch.device) -> tuple[Tensor, int]:
        """Tokens of a full row that this rank takes [L], and how many of the last are padding of ours; made once.

        Padding repeats the last token of the row.
        """

        def make() -> tuple[Tensor, int]:
            positions = self.row_positions()
            index = torch.from_numpy(np.minimum(positions, self.length - 1)).to(device)
            return index, int((positions >= self.length).sum())

        return self.once(("taken", device), make)


def make_layout(
    documents: Documents,
    batch: int,
    length: int,
    mesh: UspMesh,
    order: str = "auto",
    kinds: tuple[MaskKind, ...] = (CAUSAL,),
) -> Layout:
    """Layout of `batch` rows of `length` tokens; `documents` cover batch * length positions.

    order "auto" takes what suits the masks of `kinds`, one entry per layer (`dealing.deal_row`).
    """
    # Zigzag wants 2 chunks per ring rank, ulysses equal slices of each ring rank's tokens.
    unit = mesh.ring_degree * int(np.lcm(2 if mesh.ring_degree > 1 else 1, mesh.ulysses_degree))
    # To Transformers a share of one token is a step of generation, in which recurrent layers get no mask.
    least = 2 * mesh.size if mesh.size > 1 else 1
    padded = -(-max(length, least) // unit) * unit
    layout = Layout(mesh, batch, length, padded, order, _append_padding(documents, batch, length, padded))
    masks = {kind: layout.mask(kind) for kind in kinds}
    layout.order, layout.shards = deal_row(batch, padded, mesh.ring_degree, order, [masks[kind] for kind in kinds])
    return layout


def _append_padding(documents: Documents, batch: int, length: int, padded: int) -> Documents:
    """The same documents when every row grows from `length` to `padded` tokens that nobody sees."""
    if padded == length:
        return documents
    starts, stops = documents.bounds[:-1], documents.bounds[1:]
    row = starts // length
    shift = row * (padded - length)
    ends_row = np.concatenate((row[1:] != row[:-1], [True]))
    pad_starts = (stops + shift)[ends_row]
    bounds = np.concatenate((starts + shift, pad_starts))
    by_start = np.argsort(bounds, kind="stable")
    first = np.concatenate((documents.first + shift, pad_starts))[by_start]
    last = np.concatenate((documents.last + shift, pad_starts))[by_start]
    return Documents(np.append(bounds[by_start], batch * padded), first, last)


def find_documents(
    batch: int,
    length: int,
    attention_mask_BS: Tensor | None,
    position_ids_BS: Tensor | None,
    cu_seq_lens: Tensor | None = None,
) -> Documents:
    """Documents of a full batch, by the rules that Transformers follows.

    With an `attention_mask` of 0 and 1 each row is one document whose visible keys are those of the mask, which must be
    one run (left or right padding). Without one, a document starts at each row and wherever `position_ids` do not grow
    by one, or at the edges `cu_seq_lens` of the flattened batch. Raises `UspBatchError` for anything else.
    """
    starts = np.arange(batch + 1, dtype=np.int64) * length
    if cu_seq_lens is not None and (cu_seq_lens.ndim != 1 or len(cu_seq_lens) < 2):
        raise UspBatchError(
            f"cu_seq_lens of shape {tuple(cu_seq_lens.shape)}",
            rule="they are the edges of documents: one dim, from 0 to the number of tokens",
            remedy="build them with DataCollatorWithFlattening",
        )
    if attention_mask_BS is not None:
        if cu_seq_lens is not None and not np.isin(cu_seq_lens.cpu().numpy(), starts).all():
            raise UspBatchError(
                f"cu_seq_lens {cu_seq_lens.tolist()} together with an attention_mask",
                rule="with a mask every row is one document, in one process too, but for kernels that heed "
                "cu_seq_lens; no two parts of a model may see other documents",
                remedy="leave out attention_mask for packed rows",
            )
        return _rows_with_padding(attention_mask_BS, starts)
    inside = np.zeros(0, dtype=np.int64)
    if position_ids_BS is not None and position_ids_BS.ndim == 2:
        steps = (position_ids_BS.diff(dim=1) != 1).expand(batch, -1)
        row, column = steps.nonzero(as_tuple=True)
        inside = (row * length + column + 1).cpu().numpy()
    if cu_seq_lens is not None:
        edges = cu_seq_lens.cpu().numpy().astype(np.int64)
        if edges[0] != 0 or edges[-1] != batch * length or (np.diff(edges) < 0).any():
            raise UspBatchError(
                f"cu_seq_lens {edges.tolist()} for {batch} row(s) of {length} tokens",
                rule=f"they grow from 0 to the number of tokens, {batch * length}",
                remedy="build them with DataCollatorWithFlattening, or pass position_ids that restart at each document",
            )
        if len(inside) and not np.isin(inside, edges).all():
            raise UspBatchError(
                "position_ids restart where cu_seq_lens have no edge",
                rule="both describe the same documents",
                remedy="pass only one of them",
            )
        inside = edges
    return Documents.from_bounds(np.union1d(starts, inside))


def _rows_with_padding(attention_mask_BS: Tensor, starts: IntArray) -> Documents:
    mask = attention_mask_BS.bool()
    if bool((attention_mask_BS != mask).any()):
        numbers = attention_mask_BS.unique().tolist()
        raise UspBatchError(
            f"attention_mask with the numbers {', '.join(f'{n:g}' for n in numbers[:9])}",
            rule="a mask says which tokens are padding: 0, or 1 for all others; one process reads any number but 0 as "
            "1, so documents that are numbered in it see each other",
            remedy="to keep documents apart leave out attention_mask and pass position_ids that restart at each "
            "document, padding being one more, with labels of -100; if they may see each other, pass "
            "(attention_mask != 0).long()",
        )
    count = mask.sum(1)
    first = mask.int().argmax(1)
    last = mask.shape[1] - mask.flip(1).int().argmax(1)
    last = torch.where(count > 0, last, first)
    begin, end, visible = (x.cpu().numpy().astype(np.int64) for x in (first, last, count))
    holes = np.flatnonzero(end - begin != visible)
    if len(holes):
        raise UspBatchError(
            f"attention_mask of row {holes[0]} has zeros between ones",
            rule="the visible tokens of a row are one run: padding is on the left, on the right, or both",
            remedy="move the padding to an end, or pack documents with position_ids that restart and no attention_mask",
        )
    return Documents(starts, starts[:-1] + begin, starts[:-1] + end)


def cut(full: Tensor, layout: Layout, fill: float | None = None, dim: int = 1) -> Tensor:
    """This rank's tokens of a tensor whose dim `dim` is the full sequence; our padding is `fill`, or the last token."""
    if layout.mesh.size == 1:
        return full
    index, beyond = layout.taken(full.device)
    share = take(full, index, layout, dim)
    if beyond and fill is not None:
        # Positions ascend, so ours are the last.
        share.narrow(dim, share.shape[dim] - beyond, beyond).fill_(fill)
    return share


def take(full: Tensor, index: Tensor, layout: Layout, dim: int = 0) -> Tensor:
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
    def forward(ctx: Any, full: Tensor, index: Tensor, layout: Layout, dim: int) -> Tensor:
        ctx.save_for_backward(index)
        ctx.mesh, ctx.dim, ctx.shape = layout.mesh, dim, full.shape
        return full.index_select(dim, index)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        own = grads[0].new_zeros(ctx.shape).index_add_(ctx.dim, index, grads[0])
        return all_reduce_sum(own, ctx.mesh.group).div_(ctx.mesh.size), None, None, None
