"""Which documents share a row: every token once, nothing cut that fits, rows at least as full as a naive packer's."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_usp.data.packing import OVERLONG, measure, pack
from hf_usp.errors import UspBatchError, UspConfigError

LENGTHS = st.lists(st.integers(0, 40), max_size=60)
ROOMS = st.integers(2, 50)


def naive(lengths: list[int], room: int) -> int:
    """Rows of a packer that puts documents one after the other and starts a row where one does not fit."""
    rows, left = 0, 0
    for tokens in lengths:
        if tokens > left:
            rows, left = rows + 1, room
        left -= tokens
    return rows


@given(LENGTHS, ROOMS, st.sampled_from(["split", "whole"]))
def test_every_token_is_in_one_row_once_and_only_what_does_not_fit_is_cut(
    lengths: list[int], room: int, overlong: str
) -> None:
    if overlong == "whole" and lengths and min(lengths) > room:
        return
    rows = pack(lengths, room, overlong)
    found = sorted((p.document, token) for row in rows for p in row for token in range(p.start, p.stop))
    assert found == [(document, token) for document, tokens in enumerate(lengths) for token in range(tokens)]
    for row in rows:
        alone = len(row) == 1 and len(row[0]) == lengths[row[0].document]
        assert 0 < sum(map(len, row)) <= room or (overlong == "whole" and alone)
        for piece in row:
            whole = len(piece) == lengths[piece.document]
            # What is cut fills rows but for its end, and starts at a multiple of a row.
            assert whole or (lengths[piece.document] > room and piece.start % room == 0)
            assert whole or len(piece) == room or piece.stop == lengths[piece.document]
    cut = sum(tokens > room for tokens in lengths) if overlong == "split" else 0
    assert measure(rows, room).cut == cut


@given(LENGTHS, ROOMS)
def test_rows_are_as_few_as_a_naive_packer_makes_and_within_the_bound(lengths: list[int], room: int) -> None:
    fitting = [tokens for tokens in lengths if 0 < tokens <= room]
    rows = len(pack(fitting, room))
    assert math.ceil(sum(fitting) / room) <= rows <= naive(fitting, room)
    # Two rows that are half full would have been one.
    assert rows <= 2 * math.ceil(sum(fitting) / room)


@given(LENGTHS, ROOMS)
def test_order_of_documents_is_kept(lengths: list[int], room: int) -> None:
    rows = pack(lengths, room)
    firsts = [(row[0].document, row[0].start) for row in rows]
    assert firsts == sorted(firsts)
    assert all(row == sorted(row, key=lambda piece: piece.document) for row in rows)


def test_a_case_that_best_fit_loses() -> None:
    assert len(pack([3, 2, 2, 3, 2, 2], 7)) == 2
    assert len(pack([4, 3, 4, 3], 7)) == 2  # and one where next fit in this order wins nothing


def test_the_report() -> None:
    fill = measure(pack([5, 4, 7, 21, 1], 8), 8)
    assert (fill.rows, fill.documents, fill.tokens, fill.room, fill.cut) == (6, 5, 38, 48, 1)
    assert str(fill) == "5 documents, 38 tokens: 6 rows of 8 tokens, 79.17% filled, 1 documents cut"
    longer = measure(pack([20, 3], 8, "whole"), 8)
    assert (longer.rows, longer.room, longer.cut) == (2, 28, 0)


@pytest.mark.parametrize("overlong", ["whole", "refuse"])
def test_a_length_that_no_document_fits_is_refused(overlong: str) -> None:
    with pytest.raises(
        UspBatchError, match=r"no document fits rows of 8 tokens; the shortest has 9.*rows of 30 tokens"
    ):
        pack([9, 30], 8, overlong)
    with pytest.raises(UspBatchError, match="1 of 2 documents do not fit"):
        pack([7, 30], 8, "refuse")
    assert len(pack([7, 30], 8, "whole")) == 2


def test_wrong_arguments() -> None:
    with pytest.raises(UspConfigError, match="one of " + ", ".join(OVERLONG)):
        pack([3], 8, "drop")
    for length in (-1, 0, 1):
        with pytest.raises(UspConfigError, match=f"length={length}.*at least 2"):
            pack([3], length)
