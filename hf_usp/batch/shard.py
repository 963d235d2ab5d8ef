"""From a full batch to the local batch of this rank (`unshard` is the inverse).

Shape suffixes: B rows, S tokens of a full row, L tokens of a row on this rank.

A batch gets a `ForwardContext`, which holds its `SequenceLayout`. The local attention mask carries it through the model
to every layer (`sharded_tensors.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed.comm import all_reduce_sum, group_device, verify_same_across_ranks
from ..distributed.failures import on_every_rank
from ..distributed.mesh import UspMesh
from ..errors import UspBatchError
from ..kernels import check_installed
from ..sharding.intervals import IntArray
from ..utils.autograd import forbid_double_backward
from ..utils.tensors import TokenCount
from ..utils.upload import download
from .context import ForwardContext, ShardOptions
from .documents import describe_documents, documents_of
from .fingerprint import fingerprint
from .layout import SequenceLayout, make_layout
from .sharded_tensors import ContextMask, GlobalPositions, make_handle
from .validation import DESCRIBED, PER_TOKEN, check_entries, check_token_count


def shard_tensor(full: Tensor, layout: SequenceLayout, fill: float | None = None, dim: int = 1) -> Tensor:
    """This rank's tokens of a tensor whose dim `dim` is the full sequence; our padding is `fill`, or the last token."""
    if layout.mesh.size == 1:
        return full
    index, beyond = layout.local_indices(full.device)
    share = take(full, index, layout.mesh, dim)
    if beyond and fill is not None:
        # Positions ascend, so ours are the last.
        share.narrow(dim, share.shape[dim] - beyond, beyond).fill_(fill)
    return share


IGNORED = -100  # the label that Transformers leaves out of the loss


def shard(batch: Mapping[str, Any], mesh: UspMesh, *, order: str = "auto", kernel: str | None = None) -> dict[str, Any]:
    """This rank's local batch of a full batch, as keywords for a model with `attn_implementation="usp"`.

    `model(**hf_usp.shard(batch, mesh)).loss` is this rank's part; its average over all ranks of the world is the loss
    of the full batch, and the average of the gradients over all ranks is its gradient (what DDP computes).

    Args:
        batch: the same full batch on every rank of the mesh: `input_ids` [B, S] (or `inputs_embeds` [B, S, D]), and any
            of `labels`, `shift_labels`, `attention_mask` (left or right padding), `position_ids` (restarting ones are
            packed documents, if there is no attention_mask), `cu_seq_lens_q`. Other tensors are refused, other values
            passed on. Without `position_ids` a row counts 0, 1, 2 ...; pass them for models that count otherwise
            (RoBERTa from its padding token on, OPT padded on the left), which only prepared models do by themselves.
        mesh: see `UspMesh.build`.
        order: "auto" (what suits the masks of the batch), "contiguous", "zigzag" or "balanced".
        kernel: name of the kernel to use, by default the best installed.

    Returns:
        Local `input_ids` [B, L], `position_ids` [B, L], `attention_mask` [B, L], labels already shifted (`labels` and
        `shift_labels` [B, L]), `num_items_in_batch` (label tokens of the full batch / ranks of the mesh, a tensor that
        mixed precision of wrappers does not cast), and `usp`, the layout.

    Raises:
        UspBatchError on every rank of the mesh, also where only one of them has bad input or another batch.
    """
    context = begin_forward(batch, mesh, ShardOptions(order=order, kernel=kernel))
    context.manual_loop = True
    share = shard_tensors(batch, context) | {"usp": context.layout}
    if "shift_labels" in share:
        share.setdefault("num_items_in_batch", share.pop("num_labels") / mesh.size)
    count = share.get("num_items_in_batch")
    if isinstance(count, Tensor) and count.is_floating_point():
        share["num_items_in_batch"] = count.as_subclass(TokenCount)
    return share


def begin_forward(
    batch: Mapping[str, Any],
    mesh: UspMesh,
    options: ShardOptions,
    check: Callable[[Mapping[str, Any]], None] | None = None,
    names: Container[str] | None = None,
) -> ForwardContext:
    """The context of a forward, once all ranks of the mesh hold the same full batch and none refuses it.

    Args:
        batch: the full batch.
        mesh: the ranks.
        options: how to shard it.
        check: may refuse the batch by raising; what is raised on one rank ends the call on all of them.
        names: the tensors that are sharded or describe documents (all, by default); others may have any shape.
    """
    entries = {n: x for n, x in batch.items() if names is None or n in names}
    described: list[Tensor | None] = []
    error: Exception | None = None
    try:
        if check is not None:
            check(batch)
        check_token_count(batch.get("num_items_in_batch"))
        described = _described(entries)
        check_installed(options.kernel, get_tokens(batch).device)
        found = fingerprint(batch, options.order, options.kernel, options.mask_specs)
    except Exception as problem:  # every rank must hear of it, whatever it is
        error = problem
        found = torch.zeros(2, dtype=torch.int64)
    if mesh.group is not None:
        ids = get_tokens(batch)
        where = ids.device if isinstance(ids, Tensor) else group_device(mesh.group)
        read = verify_same_across_ranks(found.to(where), error, mesh.group, begins=True, beside=described)
    elif error is not None:
        raise error
    else:
        read = download(described)
    try:
        layout = _layout(entries, read, mesh, options)
    except Exception as problem:  # the batch is the same on all ranks, so all of them refuse it
        if mesh.group is not None:
            on_every_rank(problem)
        raise
    return ForwardContext(layout, options, has_shift_labels=batch.get("shift_labels") is not None)


def get_tokens(batch: Mapping[str, Any]) -> Any:
    """The entry with one value per token: input_ids, or inputs_embeds; None in a batch without either."""
    ids = batch.get("input_ids")
    return batch.get("inputs_embeds") if ids is None else ids


def _described(batch: Mapping[str, Any]) -> list[Tensor | None]:
    """Tensors of a batch that the host reads to make its layout; all that it can see without reading is right."""
    tokens = get_tokens(batch)
    if not isinstance(tokens, Tensor) or tokens.ndim < 2:
        raise UspBatchError(
            f"a batch with the keys {sorted(batch)}",
            rule="a batch has input_ids [batch, tokens] or inputs_embeds [batch, tokens, width]",
            remedy="tokenize and collate the data before the model sees it",
        )
    rows, length = tokens.shape[:2]
    if rows * length == 0:
        raise UspBatchError(
            f"an empty batch: {rows} row(s) of {length} tokens",
            rule="a batch has at least one row of one token",
            remedy="drop empty examples from the dataset",
        )
    check_entries(batch, rows, length)
    seq_lens = batch.get("cu_seq_lens_q")
    positions = batch.get("position_ids")
    if positions is not None and positions.ndim == 3 and len(positions) == 4:
        positions = positions[0]  # Qwen-VL: positions in the text come before those in time, height and width
    return describe_documents(batch.get("attention_mask"), positions, seq_lens)


def _layout(
    batch: Mapping[str, Any], read: Sequence[IntArray | None], mesh: UspMesh, options: ShardOptions
) -> SequenceLayout:
    rows, length = get_tokens(batch).shape[:2]
    documents = documents_of(rows, length, read, batch.get("attention_mask"))
    return make_layout(documents, rows, length, mesh, options.order, options.mask_specs, options.kernel)


def shard_tensors(batch: Mapping[str, Any], context: ForwardContext) -> dict[str, Any]:
    """This rank's share of a full batch that was found good.

    `num_labels` (a tensor) instead of `num_items_in_batch` where there are labels; `usp` is the context.
    """
    layout, options = context.layout, context.options
    full = {name: value for name, value in batch.items() if name not in DESCRIBED and value is not None}
    tokens = get_tokens(full)
    rows, length, device = layout.batch, layout.length, tokens.device
    labels = shifted_labels(full)
    full.pop("shift_labels", None)
    positions = full.pop("position_ids", None)
    if positions is None and options.positions is not None:
        positions = options.positions(full)
    if positions is None:
        positions = torch.arange(length, device=device)[None]
    largest = positions.max()
    full["position_ids"] = positions.expand(*positions.shape[:-2], rows, length)
    mask = full.pop("attention_mask", None)
    mask = torch.ones(rows, length, dtype=torch.bool, device=device) if mask is None else mask.bool()
    share = {
        name: shard_tensor(value, layout, dim=value.ndim - 1 if name == "position_ids" else 1)
        if name in PER_TOKEN
        else value
        for name, value in full.items()
    }
    share["attention_mask"] = ContextMask.of(shard_tensor(mask, layout, 0), make_handle(context))
    # Of one mesh all batches have the same strides, which compiled graphs look at.
    share["position_ids"] = share["position_ids"].contiguous()
    if options.largest_position:
        share["position_ids"] = GlobalPositions.of(share["position_ids"], largest)
    return share | shard_labels(labels, layout) | {"usp": context}


def shifted_labels(batch: Mapping[str, Any]) -> Tensor | None:
    """Labels [B, S] of each token's successor, shifted where the neighbour token is still visible; None without."""
    if batch.get("shift_labels") is not None:
        return batch["shift_labels"]
    labels = batch.get("labels")
    return None if labels is None else torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def shard_labels(shifted_BS: Tensor | None, layout: SequenceLayout) -> dict[str, Tensor]:
    """The keywords of a loss over this rank's tokens, and `num_labels`, the label tokens of the full batch []."""
    if shifted_BS is None:
        return {}
    share_BL = shard_tensor(shifted_BS, layout, IGNORED).contiguous()
    return {"labels": share_BL, "shift_labels": share_BL, "num_labels": (shifted_BS != IGNORED).sum()}


def take(full: Tensor, index: Tensor, mesh: UspMesh, dim: int = 0) -> Tensor:
    """Entries `index` of a tensor that all ranks hold in full, with the gradient of one process on each of them."""
    if not (full.requires_grad and torch.is_grad_enabled()):
        return full.index_select(dim, index)
    return _Take.apply(full, index, mesh, dim)


class _Take(torch.autograd.Function):
    """Each rank takes its entries. The adjoint is the mean over ranks of what their gradients say of the full tensor.

    The backward of a sharded loss multiplies by the number of ranks (`loss.py`), so the mean is the gradient of one
    process: right for a tensor whose gradient nobody averages, and for the parameters behind it, where the
    data-parallel average is one of equal gradients.
    """

    @staticmethod
    def forward(ctx: Any, full: Tensor, index: Tensor, mesh: UspMesh, dim: int) -> Tensor:
        ctx.save_for_backward(index)
        ctx.mesh, ctx.dim, ctx.shape = mesh, dim, full.shape
        return full.index_select(dim, index)

    @staticmethod
    @forbid_double_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        own = grads[0].new_zeros(ctx.shape).index_add_(ctx.dim, index, grads[0])
        return all_reduce_sum(own, ctx.mesh.group).div_(ctx.mesh.size), None, None, None
