"""Long text for causal language models: files or a dataset -> documents."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import tokenizers
import torch
from datasets import Dataset, load_dataset
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from hf_usp.errors import UspError


class TextError(UspError):
    """Text that cannot be read, or that is too short for what was asked."""


class Tokenizer(Protocol):
    """The methods needed of a tokenizer; every tokenizer of Transformers fits."""

    @property
    def eos_token_id(self) -> int | None: ...

    def __call__(self, text: Any, **kwargs: Any) -> Mapping[str, Any]: ...

    def __len__(self) -> int: ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 for the end of a document: nothing to download."""

    eos_token_id: int | None = 256

    def __call__(self, text: str | list[str], **kwargs: Any) -> Mapping[str, Any]:
        return {"input_ids": list(text.encode("utf-8")) if isinstance(text, str) else [list(t.encode()) for t in text]}

    def decode(self, ids: Sequence[int]) -> str:
        """The text of bytes; what is no UTF-8 becomes a mark."""
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

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


def file_documents(paths: Sequence[str]) -> Dataset:
    """`read_documents` as a dataset with the column `text`."""
    return Dataset.from_dict({"text": read_documents(paths)})


def full_rows(texts: Sequence[str], length: int) -> list[dict[str, torch.Tensor]]:
    """Rows of `length` bytes [length], cut from texts that follow each other; bytes that fill no row are left out."""
    ids = torch.tensor(list("\n\n".join(texts).encode()))
    if len(ids) < length:
        raise TextError(
            f"text of {len(ids)} bytes", rule=f"a row has {length}", remedy="pass more text, or fewer tokens"
        )
    return [{"input_ids": row, "labels": row} for row in ids[: len(ids) // length * length].view(-1, length)]


def dataset_documents(name: str, config: str | None, split: str, column: str, streaming: bool = False) -> Any:
    """Anything that `datasets.load_dataset` reads: a hub name, a folder, a builder."""
    rows = load_dataset(name, config, split=split, streaming=streaming)
    names = rows.column_names or list(next(iter(rows)))
    if column not in names:
        raise TextError(
            f"dataset {name}: no column {column!r}",
            rule="one column holds the text of a document",
            remedy=f"pass --text_column with one of {', '.join(names)}",
        )
    return rows


def transformers_tokenizer() -> PreTrainedTokenizerFast:
    """UTF-8 bytes and an end of text as a tokenizer of Transformers, for trainers that want one; 257 ids."""
    letters = sorted(ByteLevel.alphabet())
    model = tokenizers.Tokenizer(BPE(vocab={letter: i for i, letter in enumerate([*letters, "<eos>"])}, merges=[]))
    model.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", pad_token="<eos>")
