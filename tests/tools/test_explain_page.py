"""`hf-usp explain --output page.html` and `--dataset`: a page that needs nothing else, of a real batch."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from hf_usp.tools.cli import main
from hf_usp.tools.explain.first_batch import documents_of
from hf_usp.tools.explain.numbers import Case, explain
from hf_usp.tools.explain.page import page
from hf_usp.tools.explain.text import readable


class Balanced(HTMLParser):
    """Every opened element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_shows_every_byte() -> None:
    it = explain(Case(tokens=4096, ranks=8, heads=8, kv_heads=4, ulysses=2, window=700))
    text = page(it)
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert not re.search(r"https?://|<script|@import|url\(", text), "nothing from elsewhere"
    assert "prefers-color-scheme: dark" in text
    cells = re.findall(r"<td(?: style=[^>]*)?>([^<]*)</td>", text)
    sent = it.traffic.ring + it.traffic.ulysses
    assert cells == [readable(v) if v else "" for v in sent.flatten().tolist()]
    assert text.count('class="bar"') == 1 + len(it.plans)


def test_the_mask_is_drawn_cell_by_cell() -> None:
    it = explain(Case(tokens=96, ranks=2, heads=2, kv_heads=2, ulysses=1, documents=(40, 56)))
    rects = re.findall(r'<rect x="(\d+)" y="(\d+)" width="(\d+)"', page(it))
    drawn = np.zeros((96, 96), dtype=bool)
    for x, y, width in (map(int, rect) for rect in rects):
        drawn[y, x : x + width] = True
    i = np.arange(96)
    assert np.array_equal(drawn, (i <= i[:, None]) & ((i < 40) == (i[:, None] < 40)))


def test_a_batch_of_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents, packed = tmp_path / "documents.jsonl", tmp_path / "packed.jsonl"
    documents.write_text("".join(json.dumps({"input_ids": [1] * n}) + "\n" for n in (100, 200, 300)))
    packed.write_text(json.dumps({"input_ids": [1] * 9, "position_ids": [0, 1, 2, 3, 0, 1, 2, 0, 1]}) + "\n")
    assert documents_of(str(documents), 256) == (100, 156)
    assert documents_of(str(documents), None) == (100,)
    assert documents_of(str(packed), None) == (4, 3, 2)
    path = tmp_path / "page.html"
    arguments = f"explain --dataset {documents} --tokens 600 --ranks 4 --heads 8 --output {path}".split()
    assert main(arguments) == 0
    assert "600 tokens on 4 rank(s)" in capsys.readouterr().out and "3 documents a row" in path.read_text()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("{", "line 1"),
        ('{"text": "a"}', "KeyError"),
        ('{"input_ids": []}', "no tokens"),
        ("[1]", "TypeError"),
    ],
)
def test_data_that_is_none(content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    assert main(["explain", "--dataset", str(path), "--ranks", "2", "--heads", "2"]) == 2
    assert said in capsys.readouterr().err
    assert main(["explain", "--dataset", str(tmp_path / "none"), "--ranks", "2", "--heads", "2"]) == 2
    assert "No such file" in capsys.readouterr().err


def test_a_page_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("explain --tokens 64 --ranks 2 --heads 2 --output no/such/page.html".split()) == 2
    assert "a result file 'no/such/page.html'" in capsys.readouterr().err
