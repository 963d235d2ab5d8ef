"""The picture of an explanation: the mask by owner, the work of every ring step, the bytes between ranks.

The only module of this package that imports matplotlib, and only when a picture is asked for.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import UspConfigError
from ...sharding.intervals import IntArray
from ...utils.validation import writing
from .numbers import Explanation
from .text import describe_mask, readable, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg", ".pdf")
CELLS = 512


def check_output(path: str) -> None:
    """Refuse, before anything is computed, a picture that could not be drawn or saved."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UspConfigError(
            "a picture without matplotlib",
            rule="pictures are drawn with matplotlib",
            remedy="pip install 'hf_usp[plot]', or leave --output out",
        )
    if Path(path).suffix.lower() not in FORMATS:
        raise UspConfigError(
            f"a picture named {path!r}",
            rule=f"its name ends in {', '.join(FORMATS)}",
            remedy=f"name it {Path(path).stem or 'picture'}.png, say",
        )
    if not Path(path).resolve().parent.is_dir() or Path(path).is_dir():
        raise UspConfigError(
            f"a picture to be saved as {path!r}", rule="its folder exists", remedy="create the folder, or name another"
        )


def draw(it: Explanation, path: str) -> None:
    """Save the picture of an explanation. Raises `UspConfigError` when the file cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure of its own, without pyplot's list of open figures and without a display.
    figure = Figure(figsize=(17, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    mask_axes, work_axes, bytes_axes = figure.subplots(1, 3, width_ratios=(1.05, 1.0, 1.1))
    colours = _colours(len(it.plans))
    _draw_mask(mask_axes, it, colours)
    _draw_work(work_axes, it, colours)
    _draw_bytes(bytes_axes, it)
    figure.suptitle(f"{title(it.case)}\n{describe_mask(it)}; {it.layout.order} order", fontsize=12)
    with writing("a picture", path, "--output"):
        figure.savefig(path, dpi=130)


def _colours(count: int) -> IntArray:
    """One colour per ring rank [count, 3]: ten that are easy to tell apart, beyond that a rainbow."""
    from matplotlib import colormaps

    if count <= 10:
        return np.array(colormaps["tab10"].colors[:count])  # type: ignore[attr-defined]
    return colormaps["turbo"](np.linspace(0.05, 0.95, count))[:, :3]


def _draw_mask(axes: Axes, it: Explanation, colours: IntArray) -> None:
    """Queries down, keys to the right; coloured by the query's rank, pale where the key comes from another one."""
    total = it.layout.batch * it.layout.padded
    cells = min(total, CELLS)
    # The middle token of every cell speaks for it.
    sample = ((2 * np.arange(cells) + 1) * total) // (2 * cells)
    owner = np.empty(total, dtype=np.int64)
    for rank, shard in enumerate(it.layout.ring_shards()):
        owner[shard] = rank
    lo, hi = it.mask.interval(sample)
    seen = (sample >= lo[:, None]) & (sample < hi[:, None])
    foreign = owner[sample][:, None] != owner[sample]
    colour = colours[owner[sample]][:, None, :]
    image = np.where(foreign[..., None], 1 - 0.45 * (1 - colour), colour)
    axes.imshow(np.where(seen[..., None], image, 1.0), extent=(0, total, total, 0), interpolation="nearest")
    axes.set(xlabel="key position", ylabel="query position")
    axes.set_title(
        "who computes what\n(colour: ring rank of the query; pale: the key comes from another rank)", fontsize=10
    )
    for line in range(1, it.layout.batch):
        axes.axhline(line * it.layout.padded, color="black", linewidth=0.6)
        axes.axvline(line * it.layout.padded, color="black", linewidth=0.6)
    _thousands(axes.xaxis, 4)
    _thousands(axes.yaxis, 8)


def _draw_work(axes: Axes, it: Explanation, colours: IntArray) -> None:
    """A bar per ring rank; its parts are the steps, coloured by the rank whose keys they use."""
    mean = max(sum(plan.area for plan in it.plans) / len(it.plans), 1)
    for plan in it.plans:
        start = 0.0
        for number, step in enumerate(plan.steps):
            width = step.tiles.area() / mean * 100
            if width:
                axes.barh(plan.rank, width, left=start, color=colours[step.recv_rank], edgecolor="white", height=0.8)
            if width > 6 and len(it.plans) <= 16:
                axes.text(
                    start + width / 2, plan.rank, f"{number}", ha="center", va="center", color="white", fontsize=9
                )
            start += width
    axes.axvline(100, color="black", linewidth=1, linestyle=":")
    axes.set(xlabel="pairs computed, % of the mean rank", ylabel="ring rank", ylim=(len(it.plans) - 0.5, -0.5))
    axes.set_yticks(range(len(it.plans)) if len(it.plans) <= 16 else range(0, len(it.plans), len(it.plans) // 8))
    axes.set_title("work per ring step\n(number: step; colour: ring rank whose keys are used)", fontsize=10)


def _draw_bytes(axes: Axes, it: Explanation) -> None:
    """Sender down, receiver to the right, ring and ulysses together."""
    sent = it.traffic.ring + it.traffic.ulysses
    size = len(sent)
    image = axes.imshow(np.where(sent > 0, sent, np.nan) / 2**20, cmap="viridis", vmin=0)
    axes.figure.colorbar(image, ax=axes, label="MiB a layer, forward and backward", shrink=0.8)
    ticks = range(size) if size <= 16 else range(0, size, size // 8)
    axes.set(xlabel="receiving rank", ylabel="sending rank", xticks=ticks, yticks=ticks)
    axes.set_title(
        f"bytes between ranks (ulysses {len(it.shares)} x ring {len(it.plans)})\nblank: nothing", fontsize=10
    )
    if size <= 8:
        middle = sent.max() / 2
        for (i, j), number in np.ndenumerate(sent):
            if number:
                text = readable(number).replace(" ", "\n")
                axes.text(
                    j, i, text, ha="center", va="center", fontsize=8, color="white" if number < middle else "black"
                )


def _thousands(axis: Any, parts: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(parts, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
