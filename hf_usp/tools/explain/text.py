"""The explanation of a batch as text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ...kernels import Request, Softmax, choice_lines, kernel_report
from ...sharding.degrees import ulysses_bytes
from ...sharding.heads import HeadShare
from ...sharding.load_balance import ALL_ORDERS, assign_tokens, balance, over_batch
from .numbers import DTYPES, MOST_RANKS_LISTED, Case, Explanation, messages, selection_costs


def title(case: Case) -> str:
    """The sizes in one line."""
    rows = f" x {case.batch} rows" if case.batch > 1 else ""
    heads = f"{case.heads} query heads over {case.kv_heads} kv heads of width {case.head_dim}"
    return f"{case.tokens:,} tokens{rows} on {case.ranks} rank(s), {heads}, {case.dtype}"


def report(it: Explanation) -> str:
    """The explanation as text."""
    case = it.case
    sections = [
        ("mask", [describe_mask(it)]),
        ("degrees", [f"ulysses {len(it.shares)} x ring {len(it.plans)}", it.reason]),
        ("heads", _heads(it.shares)),
        ("order", _order(it)),
        ("tokens", _tokens(it)),
        ("work", _work(it)),
        ("bytes", _bytes(it)),
        *([] if case.selected is None else [("selection", _selection(it))]),
        ("kernel", _kernel(case)),
    ]
    return "\n".join(
        [title(case), *(f"\n{name}\n" + "\n".join(f"  {line}" for line in lines) for name, lines in sections)]
    )


def describe_mask(it: Explanation) -> str:
    """The mask in words."""
    case = it.case
    parts = ["causal" if case.causal else "both directions"]
    if case.window is not None:
        parts.append(f"window of {case.window:,} keys" + ("" if case.causal else " on either side"))
    if case.chunk is not None:
        parts.append(f"chunks of {case.chunk:,}")
    if case.documents:
        parts.append(f"{len(case.documents)} documents a row")
    return f"{', '.join(parts)}: {sum(plan.area for plan in it.plans):,} (query, key) pairs a head"


def _heads(shares: Sequence[HeadShare]) -> list[str]:
    sizes = sorted({(share.num_query, share.num_kv) for share in shares}, reverse=True)
    if len(sizes) == 1:
        return [f"{sizes[0][0]} query and {sizes[0][1]} kv heads on every ulysses rank"]
    lines = ["uneven: the ulysses degree does not divide the heads"]
    for rank, share in enumerate(shares):
        held = f"query {_span(share.q0, share.q1)}, kv {_span(share.k0, share.k1)}" if share.num_query else "none"
        lines.append(f"ulysses rank {rank}: {held}")
    mean = sum(share.num_query for share in shares) / len(shares)
    lines.append(f"balance of heads (mean / max): {mean / max(share.num_query for share in shares):.1%}")
    return lines


def _order(it: Explanation) -> list[str]:
    if len(it.plans) == 1:
        return ["one ring rank holds everything"]
    figures = []
    for order in ALL_ORDERS:
        row = assign_tokens(it.layout.batch, it.layout.padded, len(it.plans), order, [it.mask]).shards
        shards = over_batch(row, it.layout.batch, it.layout.padded)
        areas = [it.mask.area(shard) for shard in shards]
        work = sum(areas) / (len(areas) * max(areas)) if max(areas) else 1.0
        figures.append(f"{order}: work {work:.1%}, with waiting {balance(shards, it.mask):.1%}")
    how = "the better balanced" if it.case.order == "auto" else "given"
    return [f"{it.layout.order} ({how})", "balance, mean rank over slowest: " + "; ".join(figures)]


def _tokens(it: Explanation) -> list[str]:
    layout, ulysses = it.layout, len(it.shares)
    lines = []
    if layout.padded != layout.length:
        lines.append(f"rows are padded from {layout.length:,} to {layout.padded:,} tokens that nobody sees")
    lines.append(f"{layout.local_length:,} tokens of a row on every rank")
    for rank in range(min(it.case.ranks, MOST_RANKS_LISTED)):
        positions = layout.row_positions(*divmod(rank, ulysses))
        edges = np.flatnonzero(np.diff(positions) != 1) + 1
        held = ", ".join(_span(int(run[0]), int(run[-1]) + 1) for run in np.split(positions, edges) if len(run))
        lines.append(f"rank {rank} (ring {rank // ulysses}, ulysses {rank % ulysses}): {held}")
    return lines + _left_out(it)


def _work(it: Explanation) -> list[str]:
    areas = [plan.area for plan in it.plans]
    mean = sum(areas) / len(areas)
    lines = (
        [f"balance (mean / max area of the mask): {mean / max(areas):.1%}"] if max(areas) else ["nothing to compute"]
    )
    for plan in it.plans:
        steps = [
            f"from {step.recv_rank}: {len(step.tiles.q0)} tile(s), {step.tiles.area() / mean:.0%}"
            if len(step.tiles.q0)
            # Nothing to see of that rank: the step is skipped.
            else f"from {step.recv_rank}: -"
            for step in plan.steps
        ]
        lines.append(f"ring rank {plan.rank}, {plan.area / max(mean, 1):.1%} of the mean; " + "; ".join(steps))
    return lines


def _bytes(it: Explanation) -> list[str]:
    case, ulysses = it.case, len(it.shares)
    unit = case.batch * it.layout.local_length * case.head_dim * DTYPES[case.dtype].itemsize
    floor = ulysses_bytes(case.heads, case.kv_heads, ulysses) * unit
    lines = ["sent by each rank, one layer, forward and backward"]
    for rank in range(min(case.ranks, MOST_RANKS_LISTED)):
        ring, uly = int(it.traffic.ring[rank].sum()), int(it.traffic.ulysses[rank].sum())
        whole = int(it.unpruned[rank % ulysses])
        hops, exchanges = messages(it.plans[rank // ulysses], ulysses)
        text = f"ring {readable(ring)}" + (f" = {ring / whole:.2f} of the unpruned {readable(whole)}" if whole else "")
        text += f", ulysses {readable(uly)}" + (f" = {uly / floor:.2f} of the least possible" if floor else "")
        lines.append(f"rank {rank}: {text}; {hops} message(s), {exchanges} all-to-all(s)")
    total, whole = int(it.traffic.ring.sum()), int(it.unpruned.sum()) * len(it.plans)
    if whole:
        lines.append(f"all ranks: ring {readable(total)} = {total / whole:.2f} of the unpruned {readable(whole)}")
    return lines + _left_out(it)


def _selection(it: Explanation) -> list[str]:
    costs, case = selection_costs(it), it.case
    if costs is None:
        return [f"no document is longer than {case.selected:,} tokens: nothing is selected, all of the above holds"]
    share = costs.attended.sum() / max(1, costs.scored.sum())
    length = int(costs.attended.max() * len(costs.attended) / max(1, costs.attended.sum()) * 1000) / 10
    return [
        f"a query attends to {case.selected:,} keys at most; ring and ulysses above are not used",
        f"{int(costs.attended.sum()):,} (query, key) pairs a head, {share:.1%} of what is seen; busiest rank "
        f"{length:.1f}% of the mean",
        f"{int(costs.scored.sum()):,} pairs scored by each of {case.index_heads} index heads of width "
        f"{case.index_width}",
        f"sent by each rank, one layer: forward {readable(costs.forward)} (latents or keys and values, and index "
        f"keys), backward {readable(costs.backward)}",
    ]


def _kernel(case: Case) -> list[str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    softmax = Softmax(case.head_dim**-0.5)
    choices = kernel_report(Request(device, DTYPES[case.dtype], case.head_dim, case.head_dim, softmax))
    first, *others = choice_lines(choices)
    return [f"on this machine's {device.type}: {first}", *others]


def _left_out(it: Explanation) -> list[str]:
    beyond = it.case.ranks - MOST_RANKS_LISTED
    return [f"... and {beyond} more ranks"] if beyond > 0 else []


def _span(start: int, stop: int) -> str:
    return f"{start}" if stop - start == 1 else f"{start}-{stop - 1}"


def readable(number: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            break
        number /= 1024
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
