"""What a run would do, without running it: who holds what, who computes what, who sends what to whom, and why.

Everything comes from the same integers that a training step uses (`make_layout`, `make_plan`, `split_heads`), so what
is printed is what happens. `explain` makes the numbers, `report` the text, `hf_usp.picture` the picture.

Bytes are those of one layer and one sender: keys and values forward; keys and values again, and their gradients, back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .batch import Layout, MaskKind, make_layout
from .dealing import ALL_ORDERS, balance, deal_row
from .degrees import HeadShare, check_degrees, choose_ulysses_degree, split_heads, ulysses_bytes
from .errors import UspConfigError
from .kernels import Softmax, kernel_report
from .layout import UNLIMITED, Documents, IntArray, Mask, over_batch
from .mesh import UspMesh
from .plan import RingPlan, make_plan

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
MOST_RANKS_LISTED = 64
MOST_TOKENS = 1 << 26


@dataclass(frozen=True)
class Case:
    """The sizes of one attention layer and its batch. `documents` are the lengths of the documents of every row."""

    tokens: int
    ranks: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    ulysses: int | None = None
    order: str = "auto"
    window: int | None = None
    chunk: int | None = None
    documents: tuple[int, ...] = ()
    batch: int = 1
    causal: bool = True
    ranks_per_node: int | None = None
    dtype: str = "bf16"

    @property
    def kind(self) -> MaskKind:
        """The mask as a layer asks for it."""
        left = UNLIMITED if self.window is None else self.window - 1
        return MaskKind(left, 0 if self.causal else left, self.chunk or 0)


@dataclass(frozen=True, eq=False)
class Traffic:
    """Bytes from rank (row) to rank (column) of one layer, [P, P] each; rank = ring rank * U + ulysses rank."""

    ring_forward: IntArray
    ring_backward: IntArray
    ulysses_forward: IntArray
    ulysses_backward: IntArray

    @property
    def ring(self) -> IntArray:
        return self.ring_forward + self.ring_backward

    @property
    def ulysses(self) -> IntArray:
        return self.ulysses_forward + self.ulysses_backward


@dataclass(frozen=True, eq=False)
class Explanation:
    """A case worked out. plans, shards: one per ring rank; shares: one per ulysses rank; reason: of the degrees."""

    case: Case
    layout: Layout
    reason: str
    mask: Mask
    shards: list[IntArray]
    plans: list[RingPlan]
    shares: tuple[HeadShare, ...]
    traffic: Traffic

    @property
    def unpruned(self) -> IntArray:
        """Ring bytes that a rank would send if whole blocks went around, [U] by ulysses rank."""
        rows = (len(self.plans) - 1) * self.plans[0].num_rows
        return np.array([3 * rows * kv_row_bytes(share, self.case) for share in self.shares])


def kv_row_bytes(share: HeadShare, case: Case) -> int:
    """Bytes of one token's keys and values with the kv heads of one ulysses rank."""
    return 2 * share.num_kv * case.head_dim * DTYPES[case.dtype].itemsize


def explain(case: Case) -> Explanation:
    """Work a case out. Raises `UspError` for sizes that no run could have."""
    check_sizes(case)
    if case.ulysses is None:
        ulysses, reason = choose_ulysses_degree(case.ranks, case.heads, case.kv_heads, case.ranks_per_node)
    else:
        check_degrees(case.ranks, case.ulysses)
        ulysses, reason = case.ulysses, "given"
        if case.ranks_per_node is not None and case.ranks_per_node % ulysses:
            reason += f"; ulysses groups cross the edges of nodes of {case.ranks_per_node} ranks"
    ring = case.ranks // ulysses
    shares = split_heads(case.heads, case.kv_heads, ulysses)
    mesh = UspMesh(ring, ulysses, 0, 0, tuple(range(case.ranks)), None, None, None)
    starts = np.concatenate(([0], np.cumsum(case.documents or (case.tokens,))))[:-1]
    rows = np.arange(case.batch)[:, None] * case.tokens
    documents = Documents.from_bounds(np.append((rows + starts).ravel(), case.batch * case.tokens))
    layout = make_layout(documents, case.batch, case.tokens, mesh, case.order, (case.kind,))
    mask, shards = layout.mask(case.kind), over_batch(layout.shards, layout.batch, layout.padded)
    plans = [make_plan(shards, mask, rank) for rank in range(ring)]
    return Explanation(case, layout, reason, mask, shards, plans, shares, count_traffic(plans, shares, case))


def check_sizes(case: Case) -> None:
    """Refuse what is not a size, by name."""
    for name in ("tokens", "ranks", "heads", "kv_heads", "head_dim", "batch", "window", "chunk", "ranks_per_node"):
        value = getattr(case, name)
        if value is not None and value < 1:
            raise UspConfigError(f"{name} = {value}", rule=f"{name} is a whole number of at least 1")
    if case.tokens * case.batch > MOST_TOKENS:
        raise UspConfigError(
            f"{case.batch} row(s) of {case.tokens:,} tokens",
            rule=f"every token is looked at, up to {MOST_TOKENS:,} in all",
            remedy="take shorter rows: shares of work and bytes are about the same; hf-usp plan takes any length",
        )
    if case.documents and (min(case.documents) < 1 or sum(case.documents) != case.tokens):
        raise UspConfigError(
            f"documents of {', '.join(map(str, case.documents))} tokens, {sum(case.documents)} in all, in rows of "
            f"{case.tokens}",
            rule="every document has a token, and together they fill a row",
            remedy="leave --tokens out, or add a last document for the rest",
        )
    if case.dtype not in DTYPES:
        raise UspConfigError(f"dtype {case.dtype!r}", rule=f"a dtype is one of {', '.join(DTYPES)}")


def count_traffic(plans: Sequence[RingPlan], shares: Sequence[HeadShare], case: Case) -> Traffic:
    """Who sends how much to whom in one layer."""
    ulysses, size = len(shares), len(plans) * len(shares)
    ring_forward, ring_backward, uly_forward, uly_backward = (np.zeros((size, size), dtype=np.int64) for _ in range(4))
    head = case.head_dim * DTYPES[case.dtype].itemsize
    for plan in plans:
        first, tokens = plan.rank * ulysses, plan.num_rows // ulysses
        for u, mine in enumerate(shares):
            me, row = first + u, kv_row_bytes(mine, case)
            for step in plan.steps:
                ring_forward[me, step.reader * ulysses + u] += step.num_sent * row
                ring_backward[me, step.reader * ulysses + u] += step.num_sent * row
                ring_backward[me, step.source * ulysses + u] += step.receive_rows * row
            for v, theirs in enumerate(shares):
                if u != v:
                    # Out: their heads of my tokens. Back: my heads of their tokens. The gradients mirror both.
                    q_k_v = (theirs.num_query + 2 * theirs.num_kv, mine.num_query + 2 * mine.num_kv)
                    uly_forward[me, first + v] = tokens * head * (q_k_v[0] + mine.num_query)
                    uly_backward[me, first + v] = tokens * head * (theirs.num_query + q_k_v[1])
    return Traffic(ring_forward, ring_backward, uly_forward, uly_backward)


def messages(plan: RingPlan, ulysses: int) -> tuple[int, int]:
    """Messages of one layer, forward and backward: (point to point along the ring, all-to-alls along ulysses)."""
    home = sum(step.receive_rows > 0 for step in plan.steps)
    return 2 * plan.messages + home, 4 if ulysses > 1 else 0


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
        row = deal_row(it.layout.batch, it.layout.padded, len(it.plans), order, [it.mask]).shards
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
            f"from {step.source}: {len(step.tiles.q0)} tile(s), {step.tiles.area() / mean:.0%}" if len(step.tiles.q0)
            # Nothing to see of that rank: the step is skipped.
            else f"from {step.source}: -"
            for step in plan.steps
        ]  # fmt: skip
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
        text += f", ulysses {readable(uly)}" + (f" = {uly / floor:.2f} of the floor" if floor else "")
        lines.append(f"rank {rank}: {text}; {hops} message(s), {exchanges} all-to-all(s)")
    total, whole = int(it.traffic.ring.sum()), int(it.unpruned.sum()) * len(it.plans)
    if whole:
        lines.append(f"all ranks: ring {readable(total)} = {total / whole:.2f} of the unpruned {readable(whole)}")
    return lines + _left_out(it)


def _kernel(case: Case) -> list[str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    listed = kernel_report(device, DTYPES[case.dtype], case.head_dim, Softmax(case.head_dim**-0.5))
    chosen = next(name for name, why_not in listed if why_not is None)
    lines = [f"{chosen}, on this machine's {device.type}"]
    for name, why_not in listed:
        if name != chosen:
            lines.append(f"{name}: " + (f"not here, {why_not}" if why_not else "possible, further down in the order"))
    return lines


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
