"""Reading, packing and padding of text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import texts
import torch

from hf_usp import UspError

A, B, C = (torch.arange(first, first + n) for first, n in ((10, 5), (20, 4), (30, 7)))


def test_packed_rows_restart_positions_at_every_document_and_row() -> None:
    first, second = texts.pack([A, B, C], 8)
    assert first["input_ids"].tolist() == [10, 11, 12, 13, 14, 20, 21, 22]
    assert first["position_ids"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert first["labels"].tolist() == [-100, 11, 12, 13, 14, -100, 21, 22]
    assert second["input_ids"].tolist() == [23, 30, 31, 32, 33, 34, 35, 36]
    assert second["position_ids"].tolist() == [0, 0, 1, 2, 3, 4, 5, 6]
    assert second["labels"].tolist() == [-100, -100, 31, 32, 33, 34, 35, 36]


def test_what_does_not_fill_a_row_is_left_out() -> None:
    (row,) = texts.pack([A, B], 6)
    assert row["input_ids"].tolist() == [10, 11, 12, 13, 14, 20]


@pytest.mark.parametrize("length", [-1, 0, 1, 17, 10**9])
def test_absurd_sequence_lengths_are_refused(length: int) -> None:
    with pytest.raises(UspError, match=rf"--sequence_length {length} with a text of 16 tokens.*2 to 16"):
        texts.pack([A, B, C], length)


def test_whole_documents_are_padded_on_the_right() -> None:
    batch = texts.pad_right(texts.whole_documents([A, B]), pad_token_id=9)
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 14], [20, 21, 22, 23, 9]]
    assert batch["labels"].tolist() == [[-100, 11, 12, 13, 14], [-100, 21, 22, 23, -100]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1] * 4 + [0]]
    assert "position_ids" not in batch


def test_packed_rows_need_no_mask() -> None:
    batch = texts.pad_right(texts.pack([A, B, C], 8), pad_token_id=9)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["input_ids"].shape == (2, 8)


def test_documents_of_one_token_leave_nothing_to_predict() -> None:
    with pytest.raises(UspError, match="no document has two tokens"):
        texts.whole_documents([A[:1], B[:1]])


def test_bytes_and_the_end_of_a_document() -> None:
    (ids,) = texts.encode(["né"], texts.ByteTokenizer())
    assert ids.tolist() == [110, 0xC3, 0xA9, 256]


def test_files_patterns_and_folders(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("deep/b.txt", "deep/er/a.rst", "odd[1].txt"):
        (tmp_path / name).write_text(name)
    assert texts.read_documents([str(tmp_path / "deep")]) == ["deep/b.txt", "deep/er/a.rst"]
    assert texts.read_documents([str(tmp_path / "deep" / "*.txt"), str(tmp_path / "odd[1].txt")]) == [
        "deep/b.txt",
        "odd[1].txt",
    ]


def test_missing_empty_and_foreign_files_are_refused(tmp_path: Path) -> None:
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text(" \n")
    latin.write_bytes(b"caf\xe9")
    for path in (tmp_path / "none.txt", tmp_path / "*.md"):
        with pytest.raises(UspError, match="no such file"):
            texts.read_documents([str(path)])
    with pytest.raises(UspError, match="empty.txt: empty"):
        texts.read_documents([str(empty)])
    with pytest.raises(UspError, match="byte 0xe9 at offset 3 is not UTF-8.*iconv"):
        texts.read_documents([str(latin)])


def test_any_dataset_with_a_text_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"text": "one", "note": ""}, {"text": "", "note": ""}, {"text": "two", "note": ""}]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert texts.dataset_documents(str(folder), None, "train", "text") == ["one", "two"]
    with pytest.raises(UspError, match="no column 'body'.*text, note"):
        texts.dataset_documents(str(folder), None, "train", "body")
    with pytest.raises(UspError, match="empty"):
        texts.dataset_documents(str(folder), None, "train", "note")
