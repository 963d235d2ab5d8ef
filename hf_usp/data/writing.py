"""Rows written: the pieces of documents that a plan lists, one after the other, and padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..batch.shard import IGNORED
from ..compat import dataset_fingerprint
from ..errors import UspBatchError
from . import packing

PADDING_DOCUMENT = 256  # longest document of padding
AT_ONCE = 2**20  # tokens that are concatenated before they are written


def features(*names: str) -> Any:
    from datasets import Features, Sequence, Value

    return Features({name: Sequence(Value("int32")) for name in names})


def write_rows(
    documents: Any, plan: list[packing.Row], length: int, pad_token_id: int, num_proc: int | None, cached: bool
) -> Any:
    """The rows of a plan, concatenated and written a few at a time."""
    from datasets import Dataset
    from datasets.fingerprint import Hasher, is_caching_enabled

    parts = ("document", "start", "stop")
    table = Dataset.from_dict({part: [[getattr(piece, part) for piece in row] for row in plan] for part in parts})
    fingerprint = Hasher.hash((dataset_fingerprint(documents), dataset_fingerprint(table), length, pad_token_id))
    cache = None
    if cached and documents.cache_files and is_caching_enabled():
        cache = str(Path(documents.cache_files[0]["filename"]).with_name(f"cache-{fingerprint}.arrow"))
    at_once = max(1, AT_ONCE // length)
    return table.map(
        partial(_gather, documents, length, pad_token_id),
        batched=True,
        batch_size=at_once,
        writer_batch_size=at_once,
        remove_columns=table.column_names,
        features=features("input_ids", "labels", "position_ids"),
        new_fingerprint=fingerprint,
        cache_file_name=cache,
        num_proc=num_proc,
        desc=f"packing rows of {length:,} tokens",
    ).with_format("torch")


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


def check_labels(tokens: Sequence[int], labels: Sequence[int]) -> None:
    """Refuse documents whose labels are not as many as their tokens: the rest of a row would be trained on others."""
    differing = [i for i, (n, m) in enumerate(zip(tokens, labels, strict=True)) if n != m]
    if differing:
        i = differing[0]
        raise UspBatchError(
            f"{len(differing)} document(s) with other numbers of tokens and labels: {tokens[i]} and {labels[i]} in "
            f"document {i}",
            rule="every token has a label, IGNORED (-100) where it is no target",
            remedy="build labels from the same ids as the tokens, with the same truncation; or leave them out",
        )


def pack_batch(batch: Mapping[str, Any], length: int, overlong: str, pad_token_id: int) -> dict[str, list[Any]]:
    """Rows of some documents of a stream."""
    names = [name for name in ("input_ids", "labels") if name in batch]
    if "labels" in names:
        check_labels(*([len(x) for x in batch[name]] for name in names))
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
        "input_ids": np.concatenate(ids),
        "labels": np.concatenate(labels),
        "position_ids": np.concatenate(positions),
    }
