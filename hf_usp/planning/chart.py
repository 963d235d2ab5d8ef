"""The picture of a plan: memory by kind against the length of a row, and the edge where it stops fitting."""

from __future__ import annotations

from dataclasses import replace

from ..errors import UspConfigError
from .request import PlanRequest
from .search import Candidate, best_way, longest

COLOURS = {
    "weights": "#4c78a8", "gradients": "#72b7b2", "optimizer": "#54a24b", "activations": "#f58518", "logits": "#e45756",
    "buffers": "#b279a2",
}  # fmt: skip


def draw_memory(what: PlanRequest, best: Candidate, path: str) -> None:
    """Save it. Raises `UspConfigError` when the file cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    edge = longest(what, best.degrees)
    last = max(what.tokens, edge, 8192) * 1.3
    lengths = sorted({max(1024, int(last * i / 60)) for i in range(1, 61)} | ({edge} if edge else set()))
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    found = [best_way(replace(what, tokens=n, documents=()), best.degrees) for n in lengths]
    kinds = {kind: [c.prediction.memory.at_peak[kind] / 1e9 for c in found] for kind in COLOURS}
    axes.stackplot(lengths, *kinds.values(), labels=list(kinds), colors=list(COLOURS.values()), alpha=0.9)
    budget = what.budget / 1e9
    axes.axhline(budget, color="black", linestyle="--", linewidth=1)
    axes.text(lengths[0], budget, f" {budget:.0f} GB usable", va="bottom", fontsize=9)
    if edge:
        axes.axvline(edge, color="#b00020", linewidth=1.5)
        axes.text(edge, 0, f" fits up to {edge:,}", color="#b00020", rotation=90, va="bottom", ha="right", fontsize=9)
    axes.axvline(what.tokens, color="black", linewidth=1, linestyle=":")
    d = best.degrees
    axes.set(
        title=f"{what.name} on {what.gpus} x {what.machine.name}: "
        f"tp {d.tp}, ulysses {d.ulysses}, ring {d.ring}, data {d.dp_shard}",
        xlabel="tokens of a row (dotted: asked for); every length with its fastest way that fits", ylabel="GB a rank",
        ylim=(0, max(1.25 * budget, 1e-3)), xlim=(lengths[0], lengths[-1]),
    )  # fmt: skip
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:,.0f}K")
    axes.legend(loc="upper left", ncols=3, fontsize=9)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise UspConfigError(f"a picture to be saved as {path!r}: {error}", rule="the file can be written") from error
