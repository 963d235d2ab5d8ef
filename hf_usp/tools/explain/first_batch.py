"""The documents of the first batch of a data set, from a file of JSON lines."""

from __future__ import annotations

import json
from typing import Any

from ...errors import UspConfigError

RULE = "every line is a JSON object with input_ids, and position_ids where rows are packed already"
REMEDY = "write such lines, as Dataset.to_json(path) does for a tokenized data set"


def documents_of(path: str, tokens: int | None) -> tuple[int, ...]:
    """Lengths of the documents of one row.

    A line whose position_ids restart is a packed row and is taken as it is. Otherwise lines are documents, packed one
    after the other until `tokens` are full (the last one is cut); without `tokens` the first line is the row.
    Raises `UspConfigError` for a file that cannot be read or holds something else.
    """
    lengths: list[int] = []
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                lengths += _documents(line, f"{path}, line {number}")
                if tokens is None or sum(lengths) >= tokens or len(lengths) > number:
                    break
    except UspConfigError:
        raise
    except (OSError, ValueError) as problem:
        raise UspConfigError(
            f"data set {path!r}: {problem}",
            rule="a data set is a text file of JSON lines that can be read",
            remedy="pass the path of such a file, or the lengths themselves with --documents",
        ) from problem
    if not lengths:
        raise UspConfigError(f"data set {path!r} is empty", rule=RULE, remedy=REMEDY)
    kept: list[int] = []
    for length in lengths:
        room = length if tokens is None else min(length, tokens - sum(kept))
        kept += [room] if room else []
    return tuple(kept)


def _documents(line: str, where: str) -> list[int]:
    try:
        row: Any = json.loads(line)
        count = len(row["input_ids"])
        positions = row.get("position_ids") or range(count)
        starts = [0, *(i for i in range(1, count) if positions[i] != positions[i - 1] + 1), count]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as problem:
        raise UspConfigError(f"{where}: {type(problem).__name__} {problem}", rule=RULE, remedy=REMEDY) from problem
    lengths = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    if not count or min(lengths) < 1:
        raise UspConfigError(
            f"{where}: no tokens", rule="a document has at least one token", remedy="leave out lines without input_ids"
        )
    return lengths
