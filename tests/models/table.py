"""docs/models.md: one row for each architecture, written from the verdicts and read back by the tests."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import torch
import transformers

from .census import layer_kinds, tiny_config
from .listed import LISTED
from .verdict import CASES, EXACT, REFUSED, TOLERANCE, Verdict

PATH = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = """# Every causal language model of Transformers: exact or refused

A tiny random model of each of the {total} architectures of `AutoModelForCausalLM`, with the layer kinds that it has,
runs sharded on four processes and alone in one process with eager attention, both in training mode. Four forms of
batches: {forms} (ring x ulysses);
the plain one with a `num_items_in_batch` of its own. *Exact*: loss, logits and the gradient of every parameter are the
same up to rounding (the last column is the largest relative error, {tolerance:.0e} would be wrong). *Refused*:
a `UspError` before a step with other numbers is taken.

| | architectures |
|---|---|
{counts}

**Packed by**: what keeps packed documents apart. `position_ids` that restart are enough where the model's own masks
heed them in one process. Where they do not (and other documents would be seen), `position_ids` alone are refused;
with `cu_seq_lens` as well (`DataCollatorWithFlattening(return_flash_attn_kwargs=True)` gives `cu_seq_lens_q`,
`cu_seq_lens_k` and the longest lengths) the result is that of the documents run one by one. {flattened} architectures
need them.

**Random in training**: functions that draw numbers in training mode with the family's default configuration (attention
dropout, which is refused, set to 0). They were held still to compare the rest; each rank draws for its own tokens.

Written by `python -m tests.models.write_table` with Transformers {transformers} and torch {torch}; the tests compare
every row with what happens today.

Rows with a slash are variants of an architecture; the counts leave them out.

| architecture | layers | verdict | packed by | random in training | reason | error |
|---|---|---|---|---|---|---|
"""


def versions() -> dict[str, str]:
    """Of what the verdicts depend on."""
    return {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}


def render(verdicts: dict[str, Verdict]) -> str:
    """The page."""
    types = [name for name in verdicts if "/" not in name]
    counts = Counter(_group(verdicts[name]) for name in types)
    lines = [f"| {group} | {counts[group]} |" for group in sorted(counts, key=lambda g: (-counts[g], g))]
    forms = ", ".join(f"{form} on {ring} x {ulysses}" for form, (ring, ulysses) in CASES.items())
    flattened = sum(verdicts[name].packed_by == "cu_seq_lens" for name in types)
    head = HEAD.format(
        total=len(types), forms=forms, tolerance=TOLERANCE, counts="\n".join(lines), flattened=flattened, **versions()
    )
    return head + "".join(_row(name, verdicts[name]) for name in sorted(verdicts))


def _group(verdict: Verdict) -> str:
    outcomes = set(verdict.forms.values())
    if outcomes == {EXACT, REFUSED}:
        return f"{EXACT}, but refused in some form of batch"
    return verdict.summary()


def update(page: str, verdicts: dict[str, Verdict]) -> str:
    """A page of the installed versions with the rows of these architectures in place of what they were."""
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in re.findall(r"^\| .* \|$\n", page, re.MULTILINE)}
    rows = {name: line for name, line in rows.items() if line.count(" |") == 7 and name != "architecture"}
    rows |= {name: _row(name, verdict) for name, verdict in verdicts.items()}
    outcomes = {name: row.split(" | ")[2] for name, row in rows.items() if "/" not in name}
    groups = {name: _group_of(outcome) for name, outcome in outcomes.items()}
    counts = Counter(groups.values())
    lines = "".join(f"| {group} | {counts[group]} |\n" for group in sorted(counts, key=lambda g: (-counts[g], g)))
    page = re.sub(r"(\| \| architectures \|\n\|---\|---\|\n)(?:\|.*\n)+", lambda found: found[1] + lines, page)
    flattened = sum(row.split(" | ")[3].strip() == "cu_seq_lens" for name, row in rows.items() if "/" not in name)
    page = re.sub(r"\d+ architectures\nneed them", f"{flattened} architectures\nneed them", page)
    head = page[: page.index("|---|---|---|---|---|---|---|\n") + len("|---|---|---|---|---|---|---|\n")]
    return head + "".join(rows[name] for name in sorted(rows))


def _group_of(summary: str) -> str:
    """The group of a verdict's summary, as `_group` has it."""
    outcomes = {part.split(" ")[-1] if part.startswith(tuple(CASES)) else part for part in summary.split(", ")}
    return f"{EXACT}, but refused in some form of batch" if outcomes == {EXACT, REFUSED} else summary


def _row(name: str, verdict: Verdict) -> str:
    try:
        kinds = ", ".join(kind.replace("_attention", "") for kind in layer_kinds(tiny_config(name)))
    except Exception:
        kinds = ""
    reason = LISTED[name][1] if name in LISTED else shorten(verdict.reason())
    error = f"{verdict.error:.0e}" if EXACT in verdict.forms.values() else ""
    return f"| {name} | {kinds} | {cells(verdict)} | {reason} | {error} |\n"


def cells(verdict: Verdict) -> str:
    """The facts that tests compare with the page: verdict, what documents are packed by, what is random in training."""
    return f"{verdict.summary()} | {verdict.packed_by} | {', '.join(verdict.drawn)}"


def shorten(reason: str) -> str:
    """A reason without the numbers of one run, fit for a cell of a table."""
    found = re.search(r"the first module whose output differs is (\S+ \(\w+\))", reason)
    if found:
        reason = f"self-check: {found[1]} differs"
    reason = re.sub(r"^\w+ computes something else when its sequence is sharded: ", "self-check: ", reason)
    return " ".join(reason.replace("|", "/").split())[:160]


def read(text: str) -> dict[str, str]:
    """Architecture -> the cells that `cells` writes."""
    rows = re.findall(r"^\| ([\w./ -]+) \| [^|]* \| ([^|]+ \|[^|]*\|[^|]*) \| [^|]* \| [^|]* \|$", text, re.MULTILINE)
    return dict(rows)


def written_with(text: str) -> dict[str, str]:
    """The versions a page was written with."""
    found = re.search(r"with Transformers (\S+) and torch ([\d.]+\d)", text)
    return {"transformers": found[1], "torch": found[2]} if found else {}
