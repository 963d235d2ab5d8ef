"""The section of docs/versions.md that tells how the table differs with another Transformers."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

from .table import PATH, cells, read, versions, written_with
from .verdict import EXACT, REFUSED, Verdict

VERSIONS = PATH.parent / "versions.md"
BEGIN, END = "<!-- written by make table-oldest -->\n", "<!-- end -->\n"
# Where a row of an old release is neither exact nor refused, or for another reason than its name tells.
NOTES = {
    "moshi": "its eager and sdpa attention differ from each other in one process, by more than half of the logits; "
    "`usp` equals sdpa",
    "cohere_compass_text": "that version does not build it tiny",
    "dbrx": "that version does not build it tiny",
}


def section(verdicts: dict[str, Verdict], newest_page: str) -> str:
    """Differences from docs/models.md, in words and as a table."""
    rows, here, newest = read(newest_page), versions(), written_with(newest_page)
    rows.pop("architecture", None)
    missing = sorted(set(rows) - set(verdicts))
    different = [name for name in sorted(verdicts) if name in rows and cells(verdicts[name]) != rows[name]]
    groups = [verdicts[name].summary() for name in verdicts if "/" not in name]
    lines = [
        f"Run on {date.today()} with Transformers {here['transformers']} and torch {here['torch']} (CPU). Of its "
        f"{len(groups)} architectures {groups.count(EXACT)} are exact in all four forms of batches, "
        f"{groups.count(REFUSED)} are refused.",
        "",
        f"{len(set(rows) & set(verdicts)) - len(different)} rows are those of [`models.md`](models.md) (Transformers "
        f"{newest['transformers']}), {len(missing)} are not in that version: {', '.join(missing)}.",
        "The others:",
        "",
        "| architecture | verdict, packed by, random in training | in `models.md` | note |",
        "|---|---|---|---|",
    ]
    for name in different:
        now, then = (", ".join(filter(None, re.split(r"\s*\|\s*", x))) for x in (cells(verdicts[name]), rows[name]))
        lines.append(f"| {name} | {now} | {then} | {NOTES.get(name, '')} |")
    return "\n".join(lines) + "\n"


def write(verdicts: dict[str, Verdict], path: Path = VERSIONS) -> None:
    """Put the section in its place."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(before + BEGIN + section(verdicts, PATH.read_text()) + END + after)
