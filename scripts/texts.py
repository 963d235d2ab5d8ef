"""Long text for causal language models: documents (strings) -> token ids -> rows for the Trainer.

A row is a dict of one-dimensional tensors. Packed rows all have the same length; documents follow each other in them,
with `position_ids` that restart at 0 where a document (or the rest of one, at the start of a row) begins:

    input_ids      a0 a1 a2 a3 | b0 b1 b2 ...        labels   -100 a1 a2 a3 | -100 b1 b2 ...
    position_ids    0  1  2  3 |  0  1  2 ...

so attention stays inside a document and no token is predicted from another document's last one.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from hf_usp.errors import UspError

Row = dict[str, torch.Tensor]
IGNORED = -100  # the label that Transformers leaves out of the loss


class TextError(UspError):
    """Text that cannot be read, or that is too short for what was asked."""


class Tokenizer(Protocol):
    """What is needed of a tokenizer; every tokenizer of Transformers fits."""

    @property
    def eos_token_id(self) -> int | None: ...

    def __call__(self, text: str, **kwargs: Any) -> Mapping[str, Any]: ...

    def __len__(self) -> int: ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 for the end of a document: nothing to download."""

    eos_token_id: int | None = 256

    def __call__(self, text: str, **kwargs: Any) -> Mapping[str, Any]:
        return {"input_ids": list(text.encode("utf-8"))}

    def __len__(self) -> int:
        return 257


def read_documents(paths: Sequence[str]) -> list[str]:
    """Every file is one document. A path is a file, a glob pattern, or a folder (all files in it, at any depth).

    Raises `TextError` for a path that matches nothing, an empty file, and bytes that are not UTF-8.
    """
    files: list[str] = []
    for path in paths:
        pattern = os.path.join(path, "**", "*") if os.path.isdir(path) else path
        # A path that exists is taken as it is, even if its name contains [ or *.
        found = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
        if not found:
            raise TextError(
                f"--train_file {path}: no such file",
                rule="a text file, a glob pattern in quotes, or a folder of text files",
                remedy=f"check the path, seen from {os.getcwd()}",
            )
        files += found
    return [_read(file) for file in files]


def _read(file: str) -> str:
    try:
        with open(file, encoding="utf-8") as stream:
            text = stream.read()
    except UnicodeDecodeError as error:
        raise TextError(
            f"{file}: byte 0x{error.object[error.start]:02x} at offset {error.start} is not UTF-8",
            rule="text files are UTF-8",
            remedy=f"convert it, for example: iconv -f LATIN1 -t UTF-8 '{file}' > new.txt",
        ) from error
    if not text.strip():
        raise TextError(f"{file}: empty", rule="a text file holds text", remedy="leave it out")
    return text


def dataset_documents(name: str, config: str | None, split: str, column: str) -> list[str]:
    """The texts in one column of anything that `datasets.load_dataset` reads: a hub name, a folder, a builder."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise TextError(
            "--dataset_name without the package datasets", remedy="pip install datasets, or pass --train_file"
        ) from error
    rows = load_dataset(name, config, split=split)
    if column not in rows.column_names:
        raise TextError(
            f"dataset {name}: no column {column!r}",
            rule="one column holds the text of a document",
            remedy=f"pass --text_column with one of {', '.join(rows.column_names)}",
        )
    documents = [text for text in rows[column] if text and text.strip()]
    if not documents:
        raise TextError(f"dataset {name}, split {split}: empty", remedy="choose another --dataset_split")
    return documents


def encode(documents: Sequence[str], tokenizer: Tokenizer) -> list[torch.Tensor]:
    """Token ids of every document, each closed by the end-of-text token where the tokenizer has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in documents)
    return [torch.tensor([*tokens, *end], dtype=torch.int64) for tokens in ids]


def whole_documents(documents: Sequence[torch.Tensor]) -> list[Row]:
    """One row per document, of any length; `pad_right` makes batches of them."""
    rows = [{"input_ids": ids, "labels": _labels(ids, torch.arange(len(ids)))} for ids in documents if len(ids) > 1]
    if not rows:
        raise TextError("no document has two tokens", rule="a token is predicted from those before it")
    return rows


def pack(documents: Sequence[torch.Tensor], length: int) -> list[Row]:
    """Rows of exactly `length` tokens. What does not fill a last row is left out."""
    total = sum(map(len, documents))
    if length < 2 or total < length:
        raise TextError(
            f"--sequence_length {length} with a text of {total:,} tokens",
            rule="at least 2 tokens a row, and text for at least one row",
            remedy=f"choose a length from 2 to {total}, or pass more text",
        )
    count = total // length
    ids = torch.cat(list(documents))[: count * length].view(count, length)
    place = torch.cat([torch.arange(len(d)) for d in documents])[: count * length].view(count, length)
    columns = torch.arange(length)
    begins = place.eq(0) | columns.eq(0)
    position_ids = columns - torch.where(begins, columns, 0).cummax(dim=1).values
    labels = _labels(ids, position_ids)
    return [{"input_ids": ids[i], "labels": labels[i], "position_ids": position_ids[i]} for i in range(count)]


def _labels(ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """The model shifts labels itself; the first token of a document is nobody's target."""
    return ids.masked_fill(position_ids == 0, IGNORED)


def pad_right(rows: Sequence[Row], pad_token_id: int) -> Row:
    """A batch of whole documents, filled up on the right; packed rows have one length and need no attention mask."""
    fill = {"input_ids": pad_token_id, "labels": IGNORED, "position_ids": 0, "attention_mask": 0}
    if "position_ids" not in rows[0]:
        rows = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
    return {
        name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=fill[name])
        for name in rows[0]
    }
