"""Documents -> token ids -> packed rows -> batches: TRL packs, `datasets` keeps the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Features, IterableDataset, List, Value, config
from datasets.fingerprint import Hasher
from filelock import FileLock
from texts import TextError, Tokenizer
from trl import pack_dataset

from hf_usp.batch.shard import IGNORED
from hf_usp.utils.validation import check_positive_int

TOKENS_AT_ONCE = 2**27  # packed together, in memory: about 1,000 rows of 131,072 tokens, of which the last is not full
PADDING_DOCUMENT = 256  # longest document of padding
TOKEN_IDS = Features({"input_ids": List(Value("int32"))})


def tokenize(documents: Any, tokenizer: Tokenizer, column: str, **map_options: Any) -> Any:
    """`input_ids` of every document with text, each closed by the end-of-text token where the tokenizer has one.

    documents: a `Dataset` or `IterableDataset`. A document of one token has nothing to predict and is left out.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def to_ids(batch: Mapping[str, Any]) -> dict[str, Any]:
        texts = [text for text in batch[column] if text and text.strip()]
        found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        return {"input_ids": [[*ids, *end] for ids in found if len(ids) + len(end) > 1]}

    columns = documents.column_names or list(next(iter(documents)))
    return documents.map(to_ids, batched=True, remove_columns=columns, features=TOKEN_IDS, **map_options)


def load_rows(
    documents: Any,
    tokenizer: Tokenizer,
    length: int | None,
    *,
    column: str = "text",
    cache_dir: str | None = None,
    num_proc: int | None = None,
) -> Any:
    """Rows of at most `length` tokens with the `seq_lengths` of their documents; without a length, one per document.

    Documents longer than a row are split. A `Dataset` is built by the first process; the others wait at a file lock,
    which needs no process group and has no time limit, and read the files that the first has cached. A stream is packed
    1,000 documents at a time.

    Raises `TextError` for documents without text, `UspConfigError` for a length below 2.
    """
    check_positive_int(least=2, sequence_length=length)
    if isinstance(documents, IterableDataset):
        tokens = tokenize(documents, tokenizer, column)
        return tokens if length is None else pack_dataset(tokens, length, "bfd_split")
    folder = Path(cache_dir or Path(config.HF_DATASETS_CACHE) / "hf_usp")
    folder.mkdir(parents=True, exist_ok=True)
    key = Hasher.hash((documents, tokenizer, column))
    cache = {"cache_file_name": str(folder / f"tokens-{key}.arrow"), "new_fingerprint": key, "num_proc": num_proc}
    with FileLock(folder / f"{key}.lock"):
        tokens = tokenize(documents, tokenizer, column, **cache)
        if len(tokens) == 0:
            raise TextError(
                f"{len(documents)} documents without text in {column!r}",
                rule="a document has two tokens or more",
                remedy="pass --text_column with the column of the texts, or other files",
            )
        if length is None:
            return tokens
        total = pc.sum(pc.list_value_length(tokens.data["input_ids"])).as_py()
        batches = max(1, total // TOKENS_AT_ONCE)
        options = {"batch_size": -(-len(tokens) // batches), "num_proc": num_proc}
        return pack_dataset(tokens, length, "bfd_split", options)


@dataclass
class Collator:
    """Rows of a batch, filled up on the right. No row's first token, no document's and no padding is a target.

    Attributes:
        packed: rows hold several documents and list their `seq_lengths`; `position_ids` restart with each.
        cu_seq_lens: describe packed documents by `cu_seq_lens_q` as well, for models that take it.
    """

    packed: bool
    cu_seq_lens: bool

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Tensors [rows, tokens of the longest]; `cu_seq_lens` [documents + 1] of the flattened batch.

        Padding of packed rows is short documents, which cost little attention, instead of an attention mask.
        """
        longest = max(len(row["input_ids"]) for row in rows)
        batch: dict[str, list[np.ndarray]] = {"input_ids": [], "labels": [], "position_ids": [], "attention_mask": []}
        for row in rows:
            ids = np.asarray(row["input_ids"], dtype=np.int64)
            missing = longest - len(ids)
            documents = row["seq_lengths"] if self.packed else [len(ids)]
            positions = np.concatenate([*map(np.arange, documents), np.arange(missing) % PADDING_DOCUMENT])
            mask = np.arange(longest) < len(ids)
            ids = np.pad(ids, (0, missing))
            values = (ids, np.where(mask & (positions > 0), ids, IGNORED), positions, mask.astype(np.int64))
            for column, value in zip(batch.values(), values, strict=True):
                column.append(value)
        del batch["attention_mask" if self.packed else "position_ids"]
        tensors: dict[str, Any] = {name: torch.from_numpy(np.stack(column)) for name, column in batch.items()}
        if self.packed and self.cu_seq_lens:
            starts = (tensors["position_ids"].flatten() == 0).nonzero().flatten()
            edges = torch.nn.functional.pad(starts, (0, 1), value=len(rows) * longest).to(torch.int32)
            tensors |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), edges)
            tensors |= dict.fromkeys(("max_length_q", "max_length_k"), int(edges.diff().max()))
        return tensors
