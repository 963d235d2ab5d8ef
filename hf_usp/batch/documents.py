"""The documents of a full batch, by the rules that Transformers follows.

Shape suffixes: B rows, S tokens of a full row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import UspBatchError
from ..sharding.intervals import IntArray
from ..sharding.masks import Documents
from ..utils.upload import download


def append_padding(documents: Documents, batch: int, length: int, padded: int) -> Documents:
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
    described = describe_documents(attention_mask_BS, position_ids_BS, cu_seq_lens)
    return documents_of(batch, length, download(described), attention_mask_BS)


def describe_documents(
    attention_mask_BS: Tensor | None, position_ids_BS: Tensor | None, cu_seq_lens: Tensor | None
) -> list[Tensor | None]:
    """Edges, rows of a mask and steps of positions, still where the batch is: the host reads them for `documents_of`.

    Raises `UspBatchError` for what is wrong without being read.
    """
    if cu_seq_lens is not None and (cu_seq_lens.ndim != 1 or len(cu_seq_lens) < 2):
        raise UspBatchError(
            f"cu_seq_lens of shape {tuple(cu_seq_lens.shape)}",
            rule="they are the edges of documents: one dim, from 0 to the number of tokens",
            remedy="build them with DataCollatorWithFlattening",
        )
    if attention_mask_BS is not None:
        return [cu_seq_lens, _padding(attention_mask_BS), None]
    if position_ids_BS is None or position_ids_BS.ndim != 2:
        return [cu_seq_lens, None, None]
    # A byte for each token is copied: finding the places on the device would make the host wait once more.
    return [cu_seq_lens, None, position_ids_BS.diff(dim=1) != 1]


def documents_of(
    batch: int, length: int, described: Sequence[IntArray | None], attention_mask_BS: Tensor | None
) -> Documents:
    """The documents of `find_documents`, given the values of `describe_documents`; the mask itself is for a message."""
    edges, padding, steps = described
    starts = np.arange(batch + 1, dtype=np.int64) * length
    if padding is not None:
        if edges is not None and not np.isin(edges, starts).all():
            raise UspBatchError(
                f"cu_seq_lens {edges.tolist()} together with an attention_mask",
                rule="with a mask every row is one document, in one process too, but for kernels that heed "
                "cu_seq_lens; no two parts of a model may see other documents",
                remedy="leave out attention_mask for packed rows",
            )
        return _rows_with_padding(attention_mask_BS, padding, starts)
    inside = np.zeros(0, dtype=np.int64)
    if steps is not None:
        row, column = np.broadcast_to(steps, (batch, length - 1)).nonzero()
        inside = row * length + column + 1
    if edges is not None:
        edges = edges.astype(np.int64)
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


def is_left_padded(attention_mask_BS: Tensor | None) -> bool:
    """Whether a row begins with padding. It reads the device: ask only where it matters."""
    return attention_mask_BS is not None and not bool(attention_mask_BS[:, 0].all())


def _padding(attention_mask_BS: Tensor) -> Tensor:
    """Of each row its first visible token, the one after the last, how many are, and whether there are other numbers
    than 0 and 1 [4, B]."""
    mask = attention_mask_BS.bool()
    count = mask.sum(1)
    first = mask.int().argmax(1)
    last = mask.shape[1] - mask.flip(1).int().argmax(1)
    last = torch.where(count > 0, last, first)
    other = (attention_mask_BS != mask).any(1)
    return torch.stack([first, last, count, other])


def _rows_with_padding(attention_mask_BS: Tensor | None, padding_4B: IntArray, starts: IntArray) -> Documents:
    begin, end, visible, numbered = padding_4B.astype(np.int64)
    if numbered.any():
        assert attention_mask_BS is not None
        numbers = attention_mask_BS.unique().tolist()
        raise UspBatchError(
            f"attention_mask with the numbers {', '.join(f'{n:g}' for n in numbers[:9])}",
            rule="a mask says which tokens are padding: 0, or 1 for all others; one process reads any number but 0 as "
            "1, so documents that are numbered in it see each other",
            remedy="to keep documents apart leave out attention_mask and pass position_ids that restart at each "
            "document, padding being one more, with labels of -100; if they may see each other, pass "
            "(attention_mask != 0).long()",
        )
    holes = np.flatnonzero(end - begin != visible)
    if len(holes):
        raise UspBatchError(
            f"attention_mask of row {holes[0]} has zeros between ones",
            rule="the visible tokens of a row are one run: padding is on the left, on the right, or both",
            remedy="move the padding to an end, or pack documents with position_ids that restart and no attention_mask",
        )
    return Documents(starts, starts[:-1] + begin, starts[:-1] + end)
