"""Documents to rows: tokenized, packed and labelled once, the same by any way, and attended to as by themselves."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_from_disk

from hf_usp import UspError, data

from ..harness import Letters
from ..tiny import tiny_model


def documents(*lengths: int, labels: bool = False) -> Dataset:
    ids = [[10 * i + j for j in range(n)] for i, n in enumerate(lengths, start=1)]
    columns = {"input_ids": ids, "note": ["x"] * len(ids)}
    return Dataset.from_dict({**columns, "labels": [[-x for x in row] for row in ids]} if labels else columns)


def lists(rows: Any) -> list[dict[str, list[int]]]:
    return [{name: column.tolist() for name, column in row.items()} for row in rows]


def test_rows_restart_positions_and_predict_nothing_across_documents() -> None:
    rows = data.pack(documents(5, 4, 3), 8, pad_token_id=99)
    assert lists(rows) == [
        {
            "input_ids": [10, 11, 12, 13, 14, 30, 31, 32],
            "labels": [-100, 11, 12, 13, 14, -100, 31, 32],
            "position_ids": [0, 1, 2, 3, 4, 0, 1, 2],
        },
        {
            "input_ids": [20, 21, 22, 23, 99, 99, 99, 99],
            "labels": [-100, 21, 22, 23, -100, -100, -100, -100],
            "position_ids": [0, 1, 2, 3, 0, 1, 2, 3],
        },
    ]
    assert rows.info.description == "3 documents, 12 tokens: 2 rows of 8 tokens, 75.00% filled, 0 documents cut"


def test_labels_of_ones_own_and_documents_longer_than_a_row() -> None:
    first, second = lists(data.pack(documents(1, 11, labels=True), 8))
    assert first["input_ids"] == [10, 28, 29, 30, 0, 0, 0, 0]
    assert first["labels"] == [-100, -100, -29, -30, -100, -100, -100, -100]
    assert second["labels"] == [-100, *range(-21, -28, -1)]
    longer = lists(data.pack(documents(2, 11), 8, overlong="whole"))
    assert [len(row["input_ids"]) for row in longer] == [8, 11]
    with pytest.raises(UspError, match="1 of 2 documents do not fit rows of 8 tokens"):
        data.pack(documents(2, 11), 8, overlong="refuse")


def test_padding_is_short_documents() -> None:
    (full, rest) = data.pack(documents(700, 650), 1000)
    assert (rest["position_ids"][650:] == torch.arange(350) % data.PADDING_DOCUMENT).all()
    assert (full["position_ids"][700:] == torch.arange(300) % data.PADDING_DOCUMENT).all()


def test_a_stream_is_packed_some_documents_at_a_time() -> None:
    lengths = (5, 4, 3, 21, 1, 6, 7)
    everything = data.pack(documents(*lengths), 8)
    stream = data.pack(documents(*lengths).to_iterable_dataset(), 8)
    assert lists(stream) == lists(everything)
    by_two = lists(data.pack(documents(*lengths).to_iterable_dataset(), 8, documents_at_once=2))
    assert sum(label != -100 for row in by_two for label in row["labels"]) == sum(lengths) - 9  # 7 firsts, 2 more rows
    assert {len(row["input_ids"]) for row in by_two} == {8}
    tokens = data.tokenize(Dataset.from_dict({"text": ["abc", " ", "de"]}).to_iterable_dataset(), Letters())
    assert [len(row["input_ids"]) for row in tokens] == [4, 3]


def test_rows_are_cached_beside_the_documents(tmp_path: Path) -> None:
    documents(5, 4, 3).save_to_disk(tmp_path)
    on_disk = load_from_disk(str(tmp_path))
    first = data.pack(on_disk, 8)
    assert first.cache_files == data.pack(on_disk, 8).cache_files != data.pack(on_disk, 7).cache_files
    assert len(list(tmp_path.glob("cache-*.arrow"))) == 2


def test_whole_documents_are_padded_by_the_collator() -> None:
    rows = data.whole(documents(5, 1, 4))
    assert rows.info.description == "2 whole documents of 9 tokens, the longest 5"
    batch = data.Collator(pad_token_id=9)([rows[0], rows[1]])
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 14], [30, 31, 32, 33, 9]]
    assert batch["labels"].tolist() == [[-100, 11, 12, 13, 14], [-100, 31, 32, 33, -100]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1] * 4 + [0]]
    assert "position_ids" not in batch
    with pytest.raises(UspError, match="no document has two tokens"):
        data.whole(documents(1, 1))


def test_the_collator_describes_packed_documents() -> None:
    rows = data.pack(documents(5, 4, 3), 8)
    assert set(data.Collator(0)(list(rows))) == {"input_ids", "labels", "position_ids"}
    batch = data.Collator(0, cu_seq_lens=True)(list(rows))
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 5, 8, 12, 16]
    assert batch["max_length_q"] == batch["max_length_k"] == 5


@pytest.mark.parametrize("attention", ["usp", "eager"])
def test_a_packed_document_has_the_loss_it_has_alone(attention: str) -> None:
    model = tiny_model(attention=attention)
    sources = [torch.randint(3, 60, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 5, 13, 20)]
    tokens = Dataset.from_dict({"input_ids": [ids.tolist() for ids in sources]})
    alone = [model(input_ids=ids[None], labels=ids[None]).loss.item() * (len(ids) - 1) for ids in sources]
    batch = data.Collator(0)(list(data.pack(tokens, 24)))
    packed = model(**batch, use_cache=False).loss.item() * int((batch["labels"] != -100).sum())
    assert packed == pytest.approx(sum(alone), rel=1e-5)


@pytest.mark.parametrize("length", [13, 10**9])
def test_a_length_that_all_documents_together_do_not_fill(length: int) -> None:
    with pytest.raises(UspError, match=rf"rows of {length:,} tokens of documents with 12 tokens in all.*2 to 12"):
        data.pack(documents(5, 4, 3), length)


def test_text_is_needed() -> None:
    with pytest.raises(UspError, match="2 documents without text in 'text'"):
        data.tokenize(Dataset.from_dict({"text": ["", None]}), Letters())


def load(folder: str, gate: Any, built: Any) -> list[list[int]]:
    """What a rank gets; `built` counts who tokenized."""
    stock = data.tokenize

    def counted(*args: Any, **kwargs: Any) -> Any:
        with built.get_lock():
            built.value += 1
        return stock(*args, **kwargs)

    data.rows.tokenize = counted
    texts = Dataset.from_dict({"text": ["abcde", "fgh", "ij"] * 40})
    gate.wait()
    return [row["input_ids"].tolist() for row in data.load_rows(texts, Letters(), 16, cache_dir=folder)]


def rank(folder: str, gate: Any, built: Any, results: Any) -> None:
    results.put(load(folder, gate, built))


def test_one_process_builds_what_all_read(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    built, gate, results = context.Value("i", 0), context.Barrier(3), context.Queue()
    ranks = [context.Process(target=rank, args=(str(tmp_path), gate, built, results)) for _ in range(3)]
    for process in ranks:
        process.start()
    first, *others = [results.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join()
    assert built.value == 1
    assert len(first) >= 33
    assert all(other == first for other in others)
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_build_that_died_is_built_anew(tmp_path: Path) -> None:
    def fails() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.build_once(tmp_path / "x", fails)
    (tmp_path / "x.unfinished").mkdir()
    (tmp_path / "x.unfinished" / "half").write_text("")
    assert not (tmp_path / "x").exists()
    assert len(data.build_once(tmp_path / "x", lambda: documents(3))) == 1
    assert len(data.build_once(tmp_path / "x", fails)) == 1
    assert not (tmp_path / "x" / "half").exists()


def test_other_texts_lengths_and_tokenizers_are_not_confused(tmp_path: Path) -> None:
    texts = Dataset.from_dict({"text": ["abcdefg", "hij"]})

    def rows(texts: Any, length: int | None, overlong: str = "split") -> list[int]:
        made = data.load_rows(texts, Letters(), length, cache_dir=tmp_path, overlong=overlong)
        return [len(row["input_ids"]) for row in made]

    assert rows(texts, 12) == [12]
    assert rows(texts, 6) == [6, 6]
    assert rows(texts, 6, "whole") == [8, 6]
    assert rows(texts, None) == [8, 4]
    assert rows(Dataset.from_dict({"text": ["abcdefg", "hijk"]}), None) == [8, 5]
    assert len(list(tmp_path.glob("tokens-*.lock"))) == 2


def test_labels_that_are_not_as_many_as_the_tokens_are_refused() -> None:
    """All that comes behind them in a row would be trained on the wrong tokens."""
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5, 6]], "labels": [[1, 2, 3], [5, 6]]})
    for make in (
        lambda: data.pack(rows, 6),
        lambda: data.pack(rows.to_iterable_dataset(), 6),
        lambda: data.whole(rows),
    ):
        with pytest.raises(UspError, match="numbers of tokens and labels"):
            list(make())
    with pytest.raises(UspError, match="a stream of documents"):
        data.whole(rows.to_iterable_dataset())
