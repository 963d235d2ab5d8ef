"""A dataset of texts -> one of token ids -> one of rows."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..batch.shard import IGNORED
from ..compat import dataset_fingerprint
from ..errors import UspBatchError
from ..utils.validation import check_positive_int
from . import packing
from .build_once import build_once
from .collator import MOST_TOKEN, pad_id
from .writing import AT_ONCE, check_labels, features, pack_batch, write_rows

logger = logging.getLogger(__name__)


def tokenize(documents: Any, tokenizer: Any, *, column: str = "text", num_proc: int | None = None) -> Any:
    """Token ids of every document that holds text, each closed by the end-of-text token where the tokenizer has one.

    documents: a `datasets.Dataset` or `IterableDataset` with texts in `column`. Returns one with `input_ids` alone.
    Raises `UspBatchError` for a dataset without text.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def ids(batch: Mapping[str, Any]) -> dict[str, Any]:
        texts = [text for text in batch[column] if text and text.strip()]
        found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        return {"input_ids": [[*tokens, *end] for tokens in found]}

    stream, columns = _is_stream(documents), _columns(documents)
    options: dict[str, Any] = {} if stream else {"num_proc": num_proc, "desc": "tokenizing"}
    tokens = documents.map(ids, batched=True, remove_columns=columns, features=features("input_ids"), **options)
    if not stream and len(tokens) == 0:
        raise UspBatchError(
            f"{len(documents)} documents without text in {column!r}",
            rule="at least one document holds text",
            remedy=f"name the column of the texts (one of {', '.join(columns)}) with column=..., or other files",
        )
    return tokens


def pack(
    documents: Any,
    length: int,
    *,
    overlong: str = "split",
    pad_token_id: int = 0,
    documents_at_once: int = 1000,
    num_proc: int | None = None,
) -> Any:
    """Rows of `length` tokens (`input_ids`, `labels`, `position_ids`) of tokenized documents.

    documents: a `datasets.Dataset` with `input_ids`, and `labels` where not every token is a target. All of them are
    packed together; rows are written by `Dataset.map`, cached beside its files, and how full they are is logged and
    kept as `info.description`. An `IterableDataset` is packed `documents_at_once` at a time, so more of them fill rows
    better, and stays one that workers share and that can be resumed.
    overlong: what becomes of documents longer than a row (`packing.pack`): "split", "whole" (longer rows), "refuse".

    Raises:
        UspConfigError, UspBatchError: as `packing.pack`; and where all documents together do not fill one row.
    """
    check_positive_int(least=0, most=MOST_TOKEN, required=True, pad_token_id=pad_token_id)
    check_positive_int(required=True, length=length, documents_at_once=documents_at_once)
    check_positive_int(num_proc=num_proc)
    if _is_stream(documents):
        options: Any = {"length": length, "overlong": overlong, "pad_token_id": pad_token_id}
        return documents.map(
            partial(pack_batch, **options),
            batched=True,
            batch_size=documents_at_once,
            remove_columns=_columns(documents),
            features=features("input_ids", "labels", "position_ids"),
        ).with_format("torch")
    return _pack_all(documents, length, overlong, pad_token_id, num_proc=num_proc, cached=True)


def _pack_all(
    documents: Any, length: int, overlong: str, pad_token_id: int, *, num_proc: int | None, cached: bool
) -> Any:
    """Rows of a whole dataset; `cached`: beside its files."""
    plan = packing.pack(_lengths(documents), length, overlong)
    fill = packing.measure(plan, length)
    if fill.tokens < length:
        raise UspBatchError(
            f"rows of {length:,} tokens of documents with {fill.tokens:,} tokens in all",
            rule="there are documents for at least one full row",
            remedy=f"a length from 2 to {fill.tokens}, or more text",
        )
    logger.info("%s", fill)
    columns = [name for name in ("input_ids", "labels") if name in documents.column_names]
    documents = documents.select_columns(columns).with_format("numpy")
    rows = write_rows(documents, plan, length, pad_token_id, num_proc, cached)
    rows.info.description = str(fill)
    return rows


def whole(documents: Any, *, num_proc: int | None = None) -> Any:
    """One row per document (`input_ids`, `labels`), of any length; `Collator` pads batches of them.

    Documents of one token have nothing to predict and are left out. Raises `UspBatchError` if no other is there, and
    for streams.
    """
    if _is_stream(documents):
        raise UspBatchError(
            "a stream of documents to be kept whole",
            rule="lengths of all documents are known before rows are made of them",
            remedy="pack the stream into rows, or load the dataset without streaming",
        )
    lengths = _lengths(documents)
    kept = [index for index, tokens in enumerate(lengths) if tokens > 1]
    if not kept:
        raise UspBatchError(
            f"no document has two tokens, of {len(lengths)}",
            rule="a token is predicted from those before it",
            remedy="train on longer texts, or pack the documents into rows (a sequence length)",
        )
    columns = [name for name in ("input_ids", "labels") if name in documents.column_names]
    source = columns[-1]

    def targets(row: Mapping[str, Any]) -> dict[str, Any]:
        return {"labels": [IGNORED, *row[source][1:]]}

    rows = (
        documents.select_columns(columns)
        .select(kept)
        .map(targets, features=features("input_ids", "labels"), num_proc=num_proc, desc="labels")
        .with_format("torch")
    )
    tokens = sum(lengths[index] for index in kept)
    rows.info.description = f"{len(kept):,} whole documents of {tokens:,} tokens, the longest {max(lengths):,}"
    return rows


def load_rows(
    documents: Any,
    tokenizer: Any,
    length: int | None = None,
    *,
    column: str = "text",
    overlong: str = "split",
    cache_dir: str | os.PathLike[str] | None = None,
    num_proc: int | None = None,
) -> Any:
    """`tokenize`, then `pack` into rows of `length` tokens, or `whole` documents: each built once for all processes.

    cache_dir: where (default: a folder in that of `datasets`). Another text, tokenizer, length or `overlong` is built
    anew; token ids are shared by all lengths.
    """
    from datasets import config
    from datasets.fingerprint import Hasher

    root = Path(cache_dir or Path(config.HF_DATASETS_CACHE) / "hf_usp")
    key = Hasher.hash((dataset_fingerprint(documents), tokenizer, column))
    tokens = build_once(
        root / f"tokens-{key}", lambda: tokenize(documents, tokenizer, column=column, num_proc=num_proc)
    )
    if length is None:
        return build_once(root / f"whole-{key}", lambda: whole(tokens, num_proc=num_proc))

    def rows() -> Any:
        return _pack_all(tokens, length, overlong, pad_id(tokenizer), num_proc=num_proc, cached=False)

    return build_once(root / f"rows-{key}-{length}-{overlong}", rows)


def _is_stream(documents: Any) -> bool:
    from datasets import IterableDataset

    return isinstance(documents, IterableDataset)


def _columns(documents: Any) -> list[str]:
    """Names of columns; a stream that does not know them shows its first document."""
    return documents.column_names or list(next(iter(documents)))


def _lengths(documents: Any) -> list[int]:
    """Tokens of every document, as many as its labels. Raises `UspBatchError` for columns that hold something else."""
    tokens = _lengths_of(documents, "input_ids")
    if "labels" in documents.column_names:
        check_labels(tokens, _lengths_of(documents, "labels"))
    return tokens


def _lengths_of(documents: Any, name: str) -> list[int]:
    """Entries of a column of lists, without reading them into Python."""
    import pyarrow as pa
    import pyarrow.compute as pc

    lengths: list[int] = []
    if name in documents.column_names:
        batches = documents.select_columns([name]).with_format("arrow").iter(batch_size=AT_ONCE)
        for column in (batch[name] for batch in batches):
            # A column without any entry has no type.
            kind = getattr(column.type, "value_type", pa.string())
            if column.null_count or not (pa.types.is_integer(kind) or pa.types.is_null(kind)):
                break
            lengths += pc.list_value_length(column).to_pylist()
    if len(lengths) != len(documents) or not lengths:
        raise UspBatchError(
            f"{len(documents)} documents with the columns {', '.join(documents.column_names) or 'of nothing'}",
            rule=f"there are documents, whose {name} are lists of whole numbers",
            remedy="tokenize texts first: hf_usp.data.tokenize(documents, tokenizer)",
        )
    return lengths
