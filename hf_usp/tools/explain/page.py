"""The explanation of a batch as one HTML page: no script, no font and no picture from elsewhere, light and dark.

Who holds which tokens, the mask in its owners' colours, tiles per step, bytes between ranks as a matrix, and the text.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

import numpy as np

from ...utils.validation import writing
from .numbers import Explanation
from .text import describe_mask, readable, report, title

CELLS = 96
MOST_RANKS = 64
# Ten hues that are easy to tell apart on white and on black (Tableau 10), then around the circle.
COLOURS = (
    "#4e79a7",
    "#f28e2b",
    "#e15759",
    "#76b7b2",
    "#59a14f",
    "#edc948",
    "#b07aa1",
    "#ff9da7",
    "#9c755f",
    "#86bcb6",
)
STYLE = """
:root { color-scheme: light dark;
  --ink: #1a1a1a; --paper: #ffffff; --pale: #f2f3f5; --line: #cfd3d8; --heat: 33 102 172; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #14161a; --pale: #20242a; --line: #3a4048; --heat: 120 180 255; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 70rem; padding: 0 1rem; }
h1 { font-size: 1.25rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
p.note { margin: .2rem 0 .8rem; opacity: .75; }
.bar { display: flex; align-items: center; gap: .6rem; margin: .2rem 0; }
.bar b { width: 5.5rem; font-weight: 400; font-size: .85rem; flex: none; }
.bar div { display: flex; height: 1.5rem; flex: 1; background: var(--pale); }
.bar i { display: block; height: 100%; overflow: hidden; font: 11px/1.5rem sans-serif; color: #fff;
  text-align: center; }
svg { width: min(100%, 34rem); border: 1px solid var(--line); background: var(--paper); }
table { border-collapse: collapse; font-size: .8rem; } td, th { padding: .3rem .5rem; text-align: right;
  font-weight: 400; border: 1px solid var(--line); } .scroll { overflow-x: auto; }
pre { background: var(--pale); padding: 1rem; white-space: pre-wrap; font-size: .8rem; }
"""


def write_page(it: Explanation, path: str) -> None:
    """Save the page. Raises `UspConfigError` when the file cannot be written."""
    with writing("a page", path, "--output"):
        Path(path).write_text(page(it), encoding="utf-8")


def page(it: Explanation) -> str:
    """The page as text."""
    sections = [
        ("Who holds which tokens", "One row of the batch, left to right, in the colour of its ring rank.", _owners(it)),
        ("The mask", "Queries down, keys to the right; pale: the key comes from another ring rank.", _mask(it)),
        (
            "Tiles of every step",
            "A bar per ring rank, 100 % is the mean; colour: the ring rank whose keys are used; number: the step.",
            _work(it),
        ),
        ("Bytes between ranks", "Sender down, receiver to the right; one layer, forward and backward.", _bytes(it)),
    ]
    body = "".join(f'<h2>{name}</h2><p class="note">{note}</p>{content}' for name, note, content in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>hf-usp explain</title><style>{STYLE}</style></head><body>"
        f"<h1>{escape(title(it.case))}</h1><p>{escape(describe_mask(it))}; {it.layout.order} order; ulysses "
        f"{len(it.shares)} x ring {len(it.plans)}</p>{body}<h2>In words</h2>"
        f"<pre>{escape(report(it))}</pre></body></html>"
    )


def colour(rank: int, count: int) -> str:
    """Of a ring rank."""
    return COLOURS[rank] if count <= len(COLOURS) else f"hsl({360 * rank / count:.0f} 55% 52%)"


def _bar(label: str, parts: list[tuple[float, str, str]]) -> str:
    """A bar of (width in percent, colour, text)."""
    inside = "".join(f'<i style="width:{w:.3f}%;background:{c}">{t}</i>' for w, c, t in parts)
    return f'<div class="bar"><b>{label}</b><div>{inside}</div></div>'


def _owners(it: Explanation) -> str:
    ring, padded = len(it.plans), it.layout.padded
    owner = np.empty(padded, dtype=np.int64)
    for rank, shard in enumerate(it.layout.shards):
        owner[shard] = rank
    edges = np.concatenate(([0], np.flatnonzero(np.diff(owner)) + 1, [padded]))
    parts = []
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        width = 100 * (stop - start) / padded
        parts.append((width, colour(int(owner[start]), ring), str(owner[start]) if width > 2 else ""))
    return _bar(f"{it.layout.length:,} tokens", parts)


def _mask(it: Explanation) -> str:
    """Rectangles of equal cells, run by run of a row."""
    total, ring = it.layout.batch * it.layout.padded, len(it.plans)
    cells = min(total, CELLS)
    sample = ((2 * np.arange(cells) + 1) * total) // (2 * cells)
    owner = np.empty(total, dtype=np.int64)
    for rank, shard in enumerate(it.layout.ring_shards()):
        owner[shard] = rank
    lo, hi = it.mask.interval(sample)
    shapes = []
    for y in range(cells):
        state = np.where((sample >= lo[y]) & (sample < hi[y]), 1 + (owner[sample] != owner[sample[y]]), 0)
        edges = np.concatenate(([0], np.flatnonzero(np.diff(state)) + 1, [cells]))
        for start, stop in zip(edges[:-1], edges[1:], strict=True):
            if state[start]:
                fill, pale = colour(int(owner[sample[y]]), ring), "" if state[start] == 1 else ' opacity=".45"'
                shapes.append(f'<rect x="{start}" y="{y}" width="{stop - start}" height="1.02" fill="{fill}"{pale}/>')
    return f'<svg viewBox="0 0 {cells} {cells}" shape-rendering="crispEdges" role="img">{"".join(shapes)}</svg>'


def _work(it: Explanation) -> str:
    ring = len(it.plans)
    mean = max(sum(plan.area for plan in it.plans) / ring, 1)
    most = max(max(plan.area for plan in it.plans), mean)
    lines = []
    for plan in it.plans[:MOST_RANKS]:
        parts = []
        for number, step in enumerate(plan.steps):
            width = 100 * step.tiles.area() / most
            if width:
                parts.append((width, colour(step.recv_rank, ring), str(number) if width > 3 else ""))
        lines.append(_bar(f"{plan.rank}: {plan.area / mean:.1%}", parts))
    return "".join(lines)


def _bytes(it: Explanation) -> str:
    sent = (it.traffic.ring + it.traffic.ulysses)[:MOST_RANKS, :MOST_RANKS]
    most = max(int(sent.max()), 1)
    head = "".join(f"<th>{rank}</th>" for rank in range(len(sent)))
    rows = []
    for rank, row in enumerate(sent):
        cells = "".join(
            f'<td style="background:rgb(var(--heat) / {0.65 * value / most:.3f})">{readable(value)}</td>'
            if value
            else "<td></td>"
            for value in row.tolist()
        )
        rows.append(f"<tr><th>{rank}</th>{cells}<td><b>{readable(row.sum())}</b></td></tr>")
    return f'<div class="scroll"><table><tr><th></th>{head}<th>sum</th></tr>{"".join(rows)}</table></div>'
