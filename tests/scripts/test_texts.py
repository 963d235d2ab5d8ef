"""Reading text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import texts

from hf_usp import UspError


def test_bytes() -> None:
    bytes_of = texts.ByteTokenizer()
    assert bytes_of("né")["input_ids"] == [110, 0xC3, 0xA9]
    assert bytes_of(["n", "é"])["input_ids"] == [[110], [0xC3, 0xA9]]
    assert bytes_of.eos_token_id == 256 == len(bytes_of) - 1


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
    assert texts.dataset_documents(str(folder), None, "train", "text")["text"] == ["one", "", "two"]
    stream = texts.dataset_documents(str(folder), None, "train", "text", streaming=True)
    assert [row["text"] for row in stream] == ["one", "", "two"]
    for streaming in (False, True):
        with pytest.raises(UspError, match="no column 'body'.*text, note"):
            texts.dataset_documents(str(folder), None, "train", "body", streaming)
