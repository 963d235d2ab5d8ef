"""Which documents share a row: packing that splits a document only where necessary, in integers.

Rows have room for a fixed number of tokens. Documents are placed whole, longest first, each into the row that it leaves
with the least room (best-fit decreasing). Documents longer than a row are cut into row-long pieces, of which only the
last shares its row with others; or they get a longer row of their own; or they are refused.

Best-fit decreasing needs at most 11/9 of the fewest rows possible, but for a given order of documents it can lose to
filling one row after the other ("next fit": 3 3 | 2 2 2 | 2 against 3 2 2 | 3 2 2). Both are made, the fewer rows win.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from ..errors import UspBatchError, UspConfigError
from ..utils.validation import check_positive_int

OVERLONG = ("split", "whole", "refuse")


@dataclass(frozen=True)
class Piece:
    """Tokens of one document in a row.

    Attributes:
        document: index of the document.
        start: its first token in the row.
        stop: token after the last one.
    """

    document: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


Row = list[Piece]


@dataclass(frozen=True)
class Fill:
    """How full rows are.

    Attributes:
        rows: number of rows.
        length: tokens of a row.
        documents: number of documents.
        tokens: tokens of documents.
        room: tokens of all rows, padding included.
        cut: documents in more than one piece.
    """

    rows: int
    length: int
    documents: int
    tokens: int
    room: int
    cut: int

    @property
    def share(self) -> float:
        """Tokens of documents over all tokens of the rows; the rest is padding."""
        return self.tokens / self.room if self.room else 0.0

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents, {self.tokens:,} tokens: {self.rows:,} rows of {self.length:,} tokens, "
            f"{self.share:.2%} filled, {self.cut:,} documents cut"
        )


def pack(lengths: Sequence[int], length: int, overlong: str = "split") -> list[Row]:
    """Rows of at most `length` tokens that hold every token of documents of these `lengths` exactly once.

    A document that fits a row is never cut. overlong, for longer ones: "split" into row-long pieces, "whole" in a
    longer row of its own, or "refuse". Rows are in the order of their first documents, documents in a row in theirs.

    Raises:
        UspConfigError: a length below 2, or an unknown `overlong`.
        UspBatchError: a document is longer than a row and is to be refused, or none fits and all are to stay whole.
    """
    _check(lengths, length, overlong)
    rows, rest = _overlong(lengths, length, overlong == "whole")
    candidates = (_best_fit(rest, length), _next_fit(rest, length))
    shared = min(candidates, key=len)
    rows += [sorted(row, key=lambda piece: piece.document) for row in shared]
    return sorted(rows, key=lambda row: (row[0].document, row[0].start))


def measure(rows: Iterable[Row], length: int) -> Fill:
    """How full these rows are."""
    count, tokens, room = 0, 0, 0
    pieces: dict[int, int] = {}
    for row in rows:
        used = sum(map(len, row))
        count, tokens, room = count + 1, tokens + used, room + max(used, length)
        for piece in row:
            pieces[piece.document] = pieces.get(piece.document, 0) + 1
    return Fill(count, length, len(pieces), tokens, room, sum(n > 1 for n in pieces.values()))


def _check(lengths: Sequence[int], length: int, overlong: str) -> None:
    if not isinstance(overlong, str) or overlong not in OVERLONG:
        raise UspConfigError(
            f"overlong={overlong!r}",
            rule=f"it is one of {', '.join(OVERLONG)}",
            remedy="leave it out to split documents that are longer than a row",
        )
    check_positive_int(least=2, required=True, length=length)
    given: Sequence[Any] = lengths
    for number, tokens in enumerate(given):
        if type(tokens) is bool or not isinstance(tokens, Integral) or tokens < 0:
            raise UspBatchError(
                f"document {number} of {tokens!r:.60} tokens",
                rule="lengths are whole numbers of at least 0",
                remedy="pass [len(ids) for ids in documents]",
            )
    longer = sum(n > length for n in lengths)
    if longer and (overlong == "refuse" or (overlong == "whole" and longer == len(lengths))):
        raise UspBatchError(
            f"{'no document fits' if longer == len(lengths) else f'{longer} of {len(lengths)} documents do not fit'} "
            f"rows of {length:,} tokens; the shortest has {min(lengths):,}, the longest {max(lengths):,}",
            rule=f"with overlong={overlong!r} " + ("each" if overlong == "refuse" else "some") + " document fits a row",
            remedy=f"rows of {max(lengths):,} tokens, overlong='split', or no packing (whole documents)",
        )


def _overlong(lengths: Sequence[int], length: int, whole: bool) -> tuple[list[Row], list[Piece]]:
    """Full (or longer) rows of documents that do not fit, and the pieces that are left to be packed."""
    rows: list[Row] = []
    rest: list[Piece] = []
    for document, tokens in enumerate(lengths):
        start = 0
        if tokens > length:
            start = tokens if whole else tokens // length * length
            step = tokens if whole else length
            rows += [[Piece(document, at, at + step)] for at in range(0, start, step)]
        if tokens > start:
            rest.append(Piece(document, start, tokens))
    return rows, rest


def _best_fit(pieces: list[Piece], length: int) -> list[Row]:
    """Longest first, each into the row that it leaves with the least room."""
    rows: list[Row] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of by_room, ascending: few, however many rows there are
    for piece in sorted(pieces, key=len, reverse=True):
        at = bisect_left(rooms, len(piece))
        if at == len(rooms):
            row, room = len(rows), length
            rows.append([])
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        rows[row].append(piece)
        left = room - len(piece)
        if left and left not in by_room:
            by_room[left] = []
            insort(rooms, left)
        if left:
            by_room[left].append(row)
    return rows


def _next_fit(pieces: list[Piece], length: int) -> list[Row]:
    """In the order given, a new row where a document does not fit the last one."""
    rows: list[Row] = []
    room = 0
    for piece in pieces:
        if len(piece) > room:
            rows.append([])
            room = length
        rows[-1].append(piece)
        room -= len(piece)
    return rows
