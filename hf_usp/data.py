"""Documents of any length -> rows for training on long sequences, with Hugging Face datasets.

A packed row has exactly `length` tokens. Documents follow each other in it, whole where they fit (`packing`), with
`position_ids` that restart at 0 where a document (or the rest of one) begins:

    input_ids      a0 a1 a2 a3 | b0 b1 b2 | pad pad      labels   -100 a1 a2 a3 | -100 b1 b2 | -100 -100
    position_ids    0  1  2  3 |  0  1  2 |  0   1

so attention stays inside a document and no token is predicted from another document's last one. The padding of a row
is more documents, short ones: it costs no attention worth mentioning. Such rows need no collator of their own and no
attention mask; `Collator` adds `cu_seq_lens` for models that tell documents apart only by those, and pads whole
documents.

`build_once` keeps what is made of a text in a folder that all processes share: one of them builds, behind a file lock,
the others wait and map the same files.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import UspBatchError
from .integers import packing
from .shard import IGNORED

logger = logging.getLogger(__name__)

PADDING_DOCUMENT = 256  # longest document of padding
AT_ONCE = 2**20  # tokens that are put together before they are written


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
    tokens = documents.map(ids, batched=True, remove_columns=columns, features=_features("input_ids"), **options)
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
    if _is_stream(documents):
        options: Any = {"length": length, "overlong": overlong, "pad_token_id": pad_token_id}
        return documents.map(
            partial(_pack_batch, **options), batched=True, batch_size=documents_at_once,
            remove_columns=_columns(documents), features=_features("input_ids", "labels", "position_ids"),
        ).with_format("torch")  # fmt: skip
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
    rows = _write(documents, plan, length, pad_token_id, num_proc, cached)
    rows.info.description = str(fill)
    return rows


def whole(documents: Any, *, num_proc: int | None = None) -> Any:
    """One row per document (`input_ids`, `labels`), of any length; `Collator` pads batches of them.

    Documents of one token have nothing to predict and are left out. Raises `UspBatchError` if no other is there.
    """
    lengths = _lengths(documents)
    kept = [index for index, tokens in enumerate(lengths) if tokens > 1]
    if not kept:
        raise UspBatchError(
            f"{len(lengths)} documents without two tokens",
            rule="a token is predicted from those before it",
            remedy="train on longer texts, or pack the documents into rows (a sequence length)",
        )
    columns = [name for name in ("input_ids", "labels") if name in documents.column_names]
    source = columns[-1]

    def targets(row: Mapping[str, Any]) -> dict[str, Any]:
        return {"labels": [IGNORED, *row[source][1:]]}

    rows = documents.select_columns(columns).select(kept).map(
        targets, features=_features("input_ids", "labels"), num_proc=num_proc, desc="labels"
    ).with_format("torch")  # fmt: skip
    tokens = sum(lengths[index] for index in kept)
    rows.info.description = f"{len(kept):,} whole documents of {tokens:,} tokens, the longest {max(lengths):,}"
    return rows


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


def build_once(folder: str | os.PathLike[str], build: Callable[[], Any]) -> Any:
    """The dataset that `build` makes, kept in `folder`: built by the first process that asks, read by all others.

    A file lock beside the folder makes them wait, however long it takes, with or without a process group; it is freed
    where the builder dies, and the next one builds. The folder appears when it is complete. Processes that do not
    share a file system build one each.
    """
    from datasets import load_from_disk
    from filelock import FileLock

    folder = Path(folder)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                unfinished = folder.with_name(f"{folder.name}.unfinished")
                shutil.rmtree(unfinished, ignore_errors=True)  # of a process that died here
                build().save_to_disk(unfinished)
                os.replace(unfinished, folder)
    return load_from_disk(str(folder))


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
    key = Hasher.hash((documents._fingerprint, tokenizer, column))
    tokens = build_once(
        root / f"tokens-{key}", lambda: tokenize(documents, tokenizer, column=column, num_proc=num_proc)
    )
    if length is None:
        return build_once(root / f"whole-{key}", lambda: whole(tokens, num_proc=num_proc))

    def rows() -> Any:
        return _pack_all(tokens, length, overlong, pad_id(tokenizer), num_proc=num_proc, cached=False)

    return build_once(root / f"rows-{key}-{length}-{overlong}", rows)


def pad_id(tokenizer: Any) -> int:
    """The token that fills up rows: nobody attends to it, and it is no target."""
    return tokenizer.eos_token_id or 0


def _is_stream(documents: Any) -> bool:
    from datasets import IterableDataset

    return isinstance(documents, IterableDataset)


def _columns(documents: Any) -> list[str]:
    """Names of columns; a stream that does not know them shows its first document."""
    return documents.column_names or list(next(iter(documents)))


def _features(*names: str) -> Any:
    from datasets import Features, Sequence, Value

    return Features({name: Sequence(Value("int32")) for name in names})


def _lengths(documents: Any) -> list[int]:
    """Tokens of every document, without reading them into Python."""
    import pyarrow.compute as pc

    batches = documents.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=AT_ONCE)
    return [n for batch in batches for n in pc.list_value_length(batch["input_ids"]).to_pylist()]


def _write(
    documents: Any, plan: list[packing.Row], length: int, pad_token_id: int, num_proc: int | None, cached: bool
) -> Any:
    """The rows of a plan, put together and written a few at a time."""
    from datasets import Dataset
    from datasets.fingerprint import Hasher, is_caching_enabled

    parts = ("document", "start", "stop")
    table = Dataset.from_dict({part: [[getattr(piece, part) for piece in row] for row in plan] for part in parts})
    fingerprint = Hasher.hash((documents._fingerprint, table._fingerprint, length, pad_token_id))
    cache = None
    if cached and documents.cache_files and is_caching_enabled():
        cache = str(Path(documents.cache_files[0]["filename"]).with_name(f"cache-{fingerprint}.arrow"))
    at_once = max(1, AT_ONCE // length)
    return table.map(
        partial(_gather, documents, length, pad_token_id), batched=True, batch_size=at_once, writer_batch_size=at_once,
        remove_columns=table.column_names, features=_features("input_ids", "labels", "position_ids"),
        new_fingerprint=fingerprint, cache_file_name=cache, num_proc=num_proc,
        desc=f"packing rows of {length:,} tokens",
    ).with_format("torch")  # fmt: skip


def _gather(documents: Any, length: int, pad_token_id: int, plan: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Rows of a stretch of the plan."""
    rows = []
    for pieces in zip(plan["document"], plan["start"], plan["stop"], strict=True):
        found = documents[pieces[0]]
        parts = [
            {name: column[at][start:stop] for name, column in found.items()}
            for at, (_, start, stop) in enumerate(zip(*pieces, strict=True))
        ]
        rows.append(_row(parts, length, pad_token_id))
    return {name: [row[name] for row in rows] for name in rows[0]}


def _pack_batch(batch: Mapping[str, Any], length: int, overlong: str, pad_token_id: int) -> dict[str, list[Any]]:
    """Rows of some documents of a stream."""
    names = [name for name in ("input_ids", "labels") if name in batch]
    rows = [
        _row([{n: batch[n][p.document][p.start : p.stop] for n in names} for p in pieces], length, pad_token_id)
        for pieces in packing.pack([len(ids) for ids in batch["input_ids"]], length, overlong)
    ]
    return {name: [row[name] for row in rows] for name in ("input_ids", "labels", "position_ids")}


def _row(pieces: Sequence[Mapping[str, Any]], length: int, pad_token_id: int) -> dict[str, Any]:
    """Pieces of documents one after the other, filled up to `length`."""
    ids = [np.asarray(piece["input_ids"], dtype=np.int32) for piece in pieces]
    labels = [np.array(piece.get("labels", piece["input_ids"]), dtype=np.int32) for piece in pieces]
    for targets in labels:
        targets[0] = IGNORED
    positions = [np.arange(len(piece), dtype=np.int32) for piece in ids]
    missing = length - sum(map(len, ids))
    if missing > 0:
        ids.append(np.full(missing, pad_token_id, dtype=np.int32))
        labels.append(np.full(missing, IGNORED, dtype=np.int32))
        positions.append(np.arange(missing, dtype=np.int32) % PADDING_DOCUMENT)
    return {
        "input_ids": np.concatenate(ids), "labels": np.concatenate(labels), "position_ids": np.concatenate(positions)
    }  # fmt: skip
