"""From a full batch to the keywords of one rank's model call.

Shape suffixes: B rows, S tokens of a full row, L tokens of a row on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .batch import CAUSAL, Layout, MaskKind, cut, find_documents, make_layout
from .comm import agree, group_device
from .core.tickets import make_ticket
from .errors import UspBatchError
from .fingerprint import fingerprint
from .kernels import check_installed
from .mesh import UspMesh
from .passing import TokenCount
from .rope import GlobalPositions
from .validation import DESCRIBED, PER_TOKEN, check_count, check_entries

IGNORED = -100  # the label that Transformers leaves out of the loss


@dataclass(frozen=True)
class ShardOptions:
    """How to cut: the order of tokens, the masks that layers will ask for (they decide order "auto"), the kernel.

    positions: of a full batch without position_ids, [B, S] or None for 0, 1, 2 ...; they do not tell documents apart.
    largest_position: whether the model looks at the largest position of a batch (see `rope`).
    """

    order: str = "auto"
    kinds: tuple[MaskKind, ...] = (CAUSAL,)
    kernel: str | None = None
    positions: Callable[[Mapping[str, Any]], Tensor | None] | None = None
    largest_position: bool = True


_SAME_MASK = (
    Tensor.to, Tensor.bool, Tensor.long, Tensor.int, Tensor.float, Tensor.contiguous, Tensor.clone, Tensor.detach,
    Tensor.view, Tensor.reshape, Tensor.__getitem__, Tensor.eq, Tensor.__eq__, torch.eq,
)  # fmt: skip


class LayoutMask(Tensor):
    """This rank's padding mask [B, L] (True: a token) that carries the layout to where masks are made and read.

    Anything computed from it is a plain tensor; only moving, casting and looking at it otherwise keep the layout. Asked
    whether all is True it says no: models drop a mask without padding, which would depend on the rank, and the layout
    with it.
    """

    usp_layout: Layout
    usp_ticket: Tensor

    @classmethod
    def of(cls, mask_BL: Tensor, layout: Layout, ticket: Tensor | None = None) -> LayoutMask:
        mask = mask_BL.as_subclass(cls)
        mask.usp_layout, mask.usp_ticket = layout, make_ticket(layout) if ticket is None else ticket
        return mask

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func in (torch.all, Tensor.all):
            return torch.zeros_like(result, dtype=torch.bool).as_subclass(Tensor)
        same = isinstance(result, cls) and args and isinstance(args[0], cls) and result.shape == args[0].shape
        if same and func in _SAME_MASK:
            return cls.of(result, args[0].usp_layout, args[0].usp_ticket)
        return tree_map(lambda x: x.as_subclass(Tensor) if isinstance(x, cls) else x, result)


def shard(batch: Mapping[str, Any], mesh: UspMesh, *, order: str = "auto", kernel: str | None = None) -> dict[str, Any]:
    """This rank's share of a full batch, as keywords for a model with `attn_implementation="usp"`.

    `model(**hf_usp.shard(batch, mesh)).loss` is this rank's part; its average over all ranks of the world is the loss
    of the whole batch, and the average of the gradients over all ranks is its gradient (what DDP computes).

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
        `shift_labels` [B, L]), `num_items_in_batch` (label tokens of the whole batch / ranks of the mesh, a tensor that
        mixed precision of wrappers does not cast), and `usp`, the layout.

    Raises:
        UspBatchError on every rank of the mesh, also where only one of them has bad input or another batch.
    """
    share, layout = shard_with(batch, mesh, ShardOptions(order, (CAUSAL,), kernel))
    layout.by_hand = True
    if "shift_labels" in share:
        share.setdefault("num_items_in_batch", share.pop("num_labels") / mesh.size)
    count = share.get("num_items_in_batch")
    if isinstance(count, Tensor) and count.is_floating_point():
        share["num_items_in_batch"] = count.as_subclass(TokenCount)
    return share


def shard_with(
    batch: Mapping[str, Any],
    mesh: UspMesh,
    options: ShardOptions,
    check: Callable[[Mapping[str, Any]], None] | None = None,
) -> tuple[dict[str, Any], Layout]:
    """`shard` with options; `num_labels` (a tensor) instead of `num_items_in_batch` where there are labels.

    `check(batch)` may refuse the batch by raising; whatever is raised on one rank ends the call on all of them.
    """
    layout = agree_on_layout(batch, mesh, options, check)
    return cut_all(batch, layout), layout


def agree_on_layout(
    batch: Mapping[str, Any],
    mesh: UspMesh,
    options: ShardOptions,
    check: Callable[[Mapping[str, Any]], None] | None = None,
    names: Container[str] | None = None,
) -> Layout:
    """The layout of a full batch, once all ranks of the mesh hold the same one and none refuses it.

    `names`: the tensors that are cut or describe documents (all, by default); others may have any shape.
    """
    layout, error = None, None
    try:
        if check is not None:
            check(batch)
        check_count(batch.get("num_items_in_batch"))
        layout = _layout({n: x for n, x in batch.items() if names is None or n in names}, mesh, options)
        check_installed(options.kernel, tokens_of(batch).device)
        found = fingerprint(batch, options.order, options.kernel, options.kinds)
    except Exception as problem:  # every rank must hear of it, whatever it is
        error = problem
        found = torch.zeros(2, dtype=torch.int64)
    if mesh.group is not None:
        ids = tokens_of(batch)
        where = ids.device if isinstance(ids, Tensor) else group_device(mesh.group)
        agree(found.to(where), error, mesh.group, begins=True)
    elif error is not None:
        raise error
    assert layout is not None
    return layout


def tokens_of(batch: Mapping[str, Any]) -> Any:
    """What has one entry per token: input_ids, or inputs_embeds; None in a batch without either."""
    ids = batch.get("input_ids")
    return batch.get("inputs_embeds") if ids is None else ids


def _layout(batch: Mapping[str, Any], mesh: UspMesh, options: ShardOptions) -> Layout:
    tokens = tokens_of(batch)
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
    documents = find_documents(rows, length, batch.get("attention_mask"), positions, seq_lens)
    layout = make_layout(documents, rows, length, mesh, options.order, options.kinds)
    layout.kernel, layout.positions = options.kernel, options.positions
    layout.largest_position = options.largest_position
    return layout


def cut_all(batch: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """This rank's share of a full batch that was found good."""
    full = {name: value for name, value in batch.items() if name not in DESCRIBED and value is not None}
    tokens = tokens_of(full)
    rows, length, device = layout.batch, layout.length, tokens.device
    labels = shifted_labels(full)
    full.pop("shift_labels", None)
    positions = full.pop("position_ids", None)
    if positions is None and layout.positions is not None:
        positions = layout.positions(full)
    if positions is None:
        positions = torch.arange(length, device=device)[None]
    largest = positions.max()
    full["position_ids"] = positions.expand(*positions.shape[:-2], rows, length)
    mask = full.pop("attention_mask", None)
    mask = torch.ones(rows, length, dtype=torch.bool, device=device) if mask is None else mask.bool()
    share = {
        name: cut(value, layout, dim=value.ndim - 1 if name == "position_ids" else 1) if name in PER_TOKEN else value
        for name, value in full.items()
    }
    share["attention_mask"] = LayoutMask.of(cut(mask, layout, 0), layout)
    # Of one mesh all batches have the same strides, which compiled graphs look at.
    share["position_ids"] = share["position_ids"].contiguous()
    if layout.largest_position:
        share["position_ids"] = GlobalPositions.of(share["position_ids"], largest)
    share["usp"] = layout
    return share | cut_labels(labels, layout)


def shifted_labels(batch: Mapping[str, Any]) -> Tensor | None:
    """Labels [B, S] of each token's successor, shifted where the neighbour token is still visible; None without."""
    if batch.get("shift_labels") is not None:
        return batch["shift_labels"]
    labels = batch.get("labels")
    return None if labels is None else torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def cut_labels(shifted_BS: Tensor | None, layout: Layout) -> dict[str, Tensor]:
    """The keywords of a loss over this rank's tokens, and `num_labels`, the label tokens of the whole batch []."""
    if shifted_BS is None:
        return {}
    share_BL = cut(shifted_BS, layout, IGNORED).contiguous()
    return {"labels": share_BL, "shift_labels": share_BL, "num_labels": (shifted_BS != IGNORED).sum()}
