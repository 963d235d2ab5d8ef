"""The picture of a plan: memory against the length of a row, for every way to save it, and where each stops fitting."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from typing import Any

from ..utils.validation import writing
from .memory_model import KINDS, memory
from .request import PlanRequest
from .search import Candidate, jobs, longest, savings
from .workload import TrainingStep

COLOURS = dict(zip(KINDS, ("#4c78a8", "#72b7b2", "#54a24b", "#f2a65a", "#e58a8b", "#b9a0c9"), strict=True))
LINES = ("#222222", "#7b3294", "#b15928", "#1b6ca8", "#808000", "#008080")
POINTS = 64


def draw_memory(what: PlanRequest, best: Candidate, path: str) -> None:
    """Save it. Raises `UspConfigError` when the file cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    edge, d = longest(what, best.degrees), best.degrees
    first, last = max(1024, min(what.tokens, edge or what.tokens) / 16), max(what.tokens, edge, 8192) * 2
    lengths = [round(first * (last / first) ** (i / (POINTS - 1))) for i in range(POINTS)]

    def at(job: TrainingStep, tokens: int) -> dict[str, float]:
        return memory(what.model, d, replace(job, tokens=tokens)).at_peak

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes, budget = figure.subplots(), what.budget / 1e9
    chosen = [at(best.job, n) for n in lengths]
    layers = [[it[kind] / 1e9 for it in chosen] for kind in KINDS]
    areas = axes.stackplot(lengths, *layers, labels=KINDS, colors=list(COLOURS.values()))
    lines, ways = [], list(jobs(what, d))
    kinds = min(len(LINES), len({replace(job, mlp_chunk_size=None) for job in ways}))
    for i, job in enumerate(ways):
        totals = [sum(at(job, n).values()) / 1e9 for n in lengths]
        fits = bisect_right(range(1, round(last)), budget, key=lambda n: sum(at(job, n).values()) / 1e9)
        mine = job == best.job
        label = f"{savings(job)}{' (filled, by kind)' if mine else ''}: up to {fits:,}"
        style: dict[str, Any] = {"color": LINES[i % kinds], "linestyle": "-" if job.mlp_chunk_size is None else "--"}
        lines += axes.plot(lengths, totals, linewidth=2.4 if mine else 1.4, label=label, **style)
    axes.axhline(budget, color="black", linestyle="--", linewidth=1.2)
    axes.annotate(f"{budget:.0f} GB usable", (0.01, budget), xycoords=("axes fraction", "data"), va="bottom")
    for place, colour, text in ((what.tokens, "black", "asked for"), (edge, "#b00020", f"fits up to {edge:,}")):
        if place:
            axes.axvline(place, color=colour, linewidth=1.5, linestyle=":" if colour == "black" else "-")
            axes.annotate(
                text, (place, 0.98), xycoords=("data", "axes fraction"), color=colour, rotation=90, va="top", ha="right"
            )
    degrees = f"tp {d.tp}, ulysses {d.ulysses}, ring {d.ring}, data {d.dp_shard}"
    axes.set_title(f"{what.name.rstrip('/').rsplit('/', 1)[-1]} on {what.gpus} x {what.machine.name}: {degrees}")
    axes.set(xlabel="tokens of a row", ylabel="GB a rank at the peak of a step", xscale="log", xlim=(first, last))
    axes.set_ylim(0, max(1.3 * budget, 1e-3))
    ticks = [1 << power for power in range(10, 32) if first <= 1 << power <= last]
    axes.set_xticks(ticks, [_short(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.add_artist(axes.legend(handles=areas[::-1], loc="center left", fontsize=9))
    figure.legend(
        handles=lines, loc="outside lower center", ncols=1 if len(lines) < 4 else 2, fontsize=9, frameon=False
    )
    with writing("a picture", path, "--picture"):
        figure.savefig(path, dpi=130)


def _short(tokens: int) -> str:
    """1,048,576 as 1M, 1,536 as 1.5K."""
    unit, letter = (1 << 20, "M") if tokens >= 1 << 20 else (1 << 10, "K")
    return f"{tokens / unit:.3g}{letter}"
