"""Batches of rows, filled up to one length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..shard import IGNORED


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
        self.pad_token_id, self.cu_seq_lens = pad_token_id, cu_seq_lens

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One batch [rows, tokens of the longest] of every column."""
        columns = {name: [torch.as_tensor(row[name]) for row in rows] for name in rows[0]}
        packed = "position_ids" in columns
        if not packed:
            columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED, "position_ids": 0, "attention_mask": 0}
        pad = torch.nn.utils.rnn.pad_sequence
        batch: dict[str, Any] = {
            name: pad(column, batch_first=True, padding_value=fill[name]) for name, column in columns.items()
        }
        if packed and self.cu_seq_lens:
            batch |= _edges(batch["position_ids"])
        return batch


def _edges(position_ids_BS: Tensor) -> dict[str, Any]:
    """Where documents begin in the flattened batch, as variable-length attention wants it."""
    starts = (position_ids_BS.flatten() == 0).nonzero().flatten()
    edges = torch.cat((starts, starts.new_tensor([position_ids_BS.numel()]))).to(torch.int32)
    longest = int(edges.diff().max())
    return {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": longest, "max_length_k": longest}
