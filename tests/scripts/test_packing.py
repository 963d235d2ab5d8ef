"""scripts/packing.py: every token once, documents apart, built by one process; TRL and datasets do it."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import packing
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import pack_dataset

from hf_usp import UspError

from ..tiny import tiny_model


class Letters:
    """A tokenizer of single characters."""

    eos_token_id = 2

    def __call__(self, text: Any, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": [[3 + ord(c) % 60 for c in t] for t in text]}


def tokens_of(lengths: list[int]) -> Dataset:
    """Documents of tokens that are all different."""
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    ids = [list(range(start, stop)) for start, stop in zip(ends, ends[1:], strict=False)]
    return Dataset.from_dict({"input_ids": ids}, features=packing.TOKEN_IDS)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=40), st.integers(2, 50), st.sampled_from([None, 7]))
def test_trl_keeps_every_token_and_splits_only_what_does_not_fit(
    lengths: list[int], room: int, at_once: int | None
) -> None:
    tokens, pieces = tokens_of(lengths), []
    for row in pack_dataset(tokens, room, "bfd_split", {"batch_size": at_once, "keep_in_memory": True}):
        assert len(row["input_ids"]) == sum(row["seq_lengths"]) <= room
        pieces += [ids.tolist() for ids in torch.tensor(row["input_ids"]).split(row["seq_lengths"])]
    expected = [ids[at : at + room] for ids in tokens["input_ids"] for at in range(0, len(ids), room)]
    assert sorted(pieces) == expected


def test_the_collator_keeps_rows_and_documents_apart() -> None:
    rows = list(pack_dataset(tokens_of([5, 4, 3]), 8, "bfd_split", {"keep_in_memory": True}))
    batch = packing.Collator(packed=True, cu_seq_lens=True)(rows)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 4, 9, 10, 11], [5, 6, 7, 8, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 1, 2, 3, 4, -100, 10, 11], [-100, 6, 7, 8, *[-100] * 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3] * 2]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 5, 8, 12, 16]
    assert batch["max_length_q"] == batch["max_length_k"] == 5 and "attention_mask" not in batch
    long = [{"input_ids": range(700), "seq_lengths": [700]}, {"input_ids": [1, 2], "seq_lengths": [2]}]
    padding = packing.Collator(packed=True, cu_seq_lens=False)(long)["position_ids"][1, 2:]
    assert padding.tolist() == [i % 256 for i in range(698)]

    unpacked = packing.Collator(packed=False, cu_seq_lens=True)(list(tokens_of([2, 3])))
    assert unpacked["labels"].tolist() == [[-100, 1, -100], [-100, 3, 4]]
    assert unpacked["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert set(unpacked) == {"input_ids", "labels", "attention_mask"}
    with pytest.raises(KeyError, match="seq_lengths"):  # documents would see each other
        packing.Collator(packed=True, cu_seq_lens=True)([{"input_ids": rows[0]["input_ids"]}])


@pytest.mark.parametrize("attention", ["usp", "eager"])
def test_a_packed_document_has_the_loss_it_has_alone(attention: str) -> None:
    model, tokens = tiny_model(attention=attention), tokens_of([9, 5, 13, 20])
    alone = 0.0
    for ids in map(torch.tensor, tokens["input_ids"]):
        alone += model(input_ids=ids[None], labels=ids[None]).loss.item() * (len(ids) - 1)
    rows = list(pack_dataset(tokens, 24, "bfd_split", {"keep_in_memory": True}))
    batch = packing.Collator(packed=True, cu_seq_lens=False)(rows)
    packed = model(**batch, use_cache=False).loss.item() * int((batch["labels"] != -100).sum())
    assert packed == pytest.approx(alone, rel=1e-5)


def test_streams_have_the_rows_of_datasets(tmp_path: Path) -> None:
    texts = Dataset.from_dict({"text": ["abcde", " ", "fgh", None, "i" * 20, "jk"], "note": [0] * 6})
    for length in (8, None):
        rows = packing.load_rows(texts, Letters(), length, cache_dir=str(tmp_path))
        assert list(packing.load_rows(texts.to_iterable_dataset(), Letters(), length)) == list(rows)
        assert sum(len(row["input_ids"]) for row in rows) == 6 + 4 + 21 + 3


def test_large_datasets_are_packed_some_tokens_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "TOKENS_AT_ONCE", 30)
    texts = Dataset.from_dict({"text": ["abcde"] * 20})
    rows = packing.load_rows(texts, Letters(), 13, cache_dir=str(tmp_path))
    assert [len(row["input_ids"]) for row in rows] == [12, 12, 6] * 4  # 120 tokens: four times five documents


def test_other_texts_and_lengths_are_not_confused_and_no_text_is_refused(tmp_path: Path) -> None:
    def lengths(texts: list[str], length: int | None) -> list[int]:
        rows = packing.load_rows(Dataset.from_dict({"text": texts}), Letters(), length, cache_dir=str(tmp_path))
        return [len(row["input_ids"]) for row in rows]

    assert lengths(["abcdefg", "hij"], 12) == [12]
    assert lengths(["abcdefg", "hij"], 6) == [6, 6]
    assert lengths(["abcdefg", "hij"], None) == [8, 4]
    assert lengths(["abcdefg", "hijk"], None) == [8, 5]
    with pytest.raises(UspError, match="2 documents without text in 'text'"):
        lengths([" ", ""], None)
    with pytest.raises(UspError, match="sequence_length=1.*at least 2"):
        lengths(["abc"], 1)


class Counted(Letters):
    """Counts in a file how many texts are tokenized."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __call__(self, text: Any, **kwargs: Any) -> dict[str, Any]:
        with open(self.file, "a") as log:
            log.write("x" * len(text))
        return super().__call__(text)


def rank(folder: str, gate: Any, results: Any) -> None:
    texts = Dataset.from_dict({"text": ["abcde", "fgh", "ij"] * 40})
    gate.wait()
    rows = packing.load_rows(texts, Counted(f"{folder}/log"), 16, cache_dir=folder)
    results.put([row["input_ids"] for row in rows])


def test_one_process_builds_what_all_read(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    gate, results = context.Barrier(3), context.Queue()
    ranks = [context.Process(target=rank, args=(str(tmp_path), gate, results)) for _ in range(3)]
    for process in ranks:
        process.start()
    first, *others = [results.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join()
    assert (tmp_path / "log").read_text() == "x" * 120
    assert sum(map(len, first)) == 40 * 13 and all(other == first for other in others)
