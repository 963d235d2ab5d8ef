"""Batches of rows, filled up to one length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch.shard import IGNORED
from ..errors import UspBatchError
from ..utils.validation import check_positive_int, check_switches

COLUMNS = {"input_ids", "labels", "position_ids", "attention_mask"}
MOST_TOKEN = (1 << 31) - 1  # rows are kept as int32


def pad_id(tokenizer: Any) -> int:
    """The token that fills up rows: nobody attends to it, and it is no target."""
    return tokenizer.eos_token_id or 0


class Collator:
    """Batches of rows. Whole documents are filled up on the right; packed rows get no attention mask.

    pad_token_id: id that fills up shorter rows. cu_seq_lens: also describe packed documents as flash attention's
    flattening collator does (`cu_seq_lens_q/k`, `max_length_q/k`), for models that do not heed restarting
    `position_ids` (recurrent layers of Transformers in one process).
    """

    def __init__(self, pad_token_id: int, cu_seq_lens: bool = False) -> None:
        check_positive_int(least=0, most=MOST_TOKEN, required=True, pad_token_id=pad_token_id)
        check_switches(cu_seq_lens=cu_seq_lens)
        self.pad_token_id, self.cu_seq_lens = pad_token_id, cu_seq_lens

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One batch [rows, tokens of the longest] of every column.

        Raises `UspBatchError` for rows that are not alike, and for columns that are not one whole number per token.
        """
        columns = _columns(rows)
        packed = "position_ids" in columns
        if not packed and "attention_mask" not in columns:
            columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED, "position_ids": 0, "attention_mask": 0}
        pad = torch.nn.utils.rnn.pad_sequence
        batch: dict[str, Any] = {
            name: pad(column, batch_first=True, padding_value=fill[name]) for name, column in columns.items()
        }
        if packed and self.cu_seq_lens:
            batch |= _edges(batch["position_ids"])
        return batch


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Tensor]]:
    """The rows' columns as tensors [tokens of the row]."""
    names = set().union(*rows) if rows else set()
    if "input_ids" not in names or not names <= COLUMNS or any(set(row) != names for row in rows):
        raise UspBatchError(
            f"{len(rows)} row(s) with the columns {', '.join(sorted(map(str, names))) or 'of nothing'}",
            rule=f"there is a row; all have input_ids, and the same ones of {', '.join(sorted(COLUMNS))}",
            remedy="keep only these with dataset.select_columns, or write a collator of your own",
        )
    columns: dict[str, list[Tensor]] = {}
    for name in rows[0]:
        for row in rows:
            columns.setdefault(name, []).append(_tokens(name, row))
    if not any(map(len, columns["input_ids"])):
        raise UspBatchError(
            f"{len(rows)} row(s) without a token", rule="a batch has a token", remedy="leave out rows without input_ids"
        )
    return columns


def _tokens(name: str, row: Mapping[str, Any]) -> Tensor:
    """One column of a row [tokens], as long as its `input_ids`."""
    try:
        values, tokens = torch.as_tensor(row[name]), len(row["input_ids"])
    except (TypeError, ValueError, RuntimeError):
        values, tokens = torch.zeros(()), -1
    whole = not values.is_floating_point() and not values.is_complex() or values.numel() == 0
    if values.ndim != 1 or len(values) != tokens or not whole:
        raise UspBatchError(
            f"a row with {name}={row[name]!r:.60}",
            rule=f"{name} is one whole number for each of the row's input_ids",
            remedy="tokenize texts first (hf_usp.data.tokenize), and build labels with the length of the tokens",
        )
    return values.long()


def _edges(position_ids_BS: Tensor) -> dict[str, Any]:
    """Where documents begin in the flattened batch, as variable-length attention wants it."""
    starts = (position_ids_BS.flatten() == 0).nonzero().flatten()
    edges = torch.cat((starts, starts.new_tensor([position_ids_BS.numel()]))).to(torch.int32)
    longest = int(edges.diff().max())
    return {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": longest, "max_length_k": longest}
