"""Numbers of a run without running it: tokens, work and bytes of each rank, and the reasons.

Everything comes from the same integers that a training step uses (`make_layout`, its `ring_schedule`, `split_heads`),
so what is printed is what happens. Here are the numbers; `text`, `picture` and `page` show them.

Bytes are those of one layer and one sender: keys and values forward; keys and values again, and their gradients, back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...batch.layout import MaskSpec, SequenceLayout, make_layout
from ...distributed.mesh import UspMesh
from ...errors import UspConfigError
from ...sharding.degrees import check_degrees, choose_ulysses_degree
from ...sharding.heads import HeadShare, split_heads
from ...sharding.intervals import IntArray
from ...sharding.masks import UNLIMITED, Documents, Mask
from ...sharding.schedule import RingSchedule, ring_per_node
from ...sharding.selections import longest_document, selected_area, selection_bytes
from ...utils.dtypes import DTYPES, check_dtype
from ...utils.validation import check_positive_int

MOST_RANKS_LISTED = 64
MOST_TOKENS = 1 << 26
MOST_RING, MOST_RANKS, MOST_HEADS = 128, 1024, 4096  # every pair of ring ranks is looked at, in every order


@dataclass(frozen=True)
class Case:
    """The sizes of one attention layer and its batch.

    Attributes:
        tokens: tokens of a row.
        ranks: ranks of the mesh.
        heads: query heads.
        kv_heads: kv heads.
        head_dim: width of a head.
        ulysses: ulysses degree; None: chosen.
        order: order of tokens.
        window: keys that a query sees; None: no window.
        chunk: tokens of a chunk; None: no chunks.
        documents: lengths of the documents of every row.
        batch: rows.
        causal: whether a query sees no later key.
        ranks_per_node: ranks of a node; None: all.
        dtype: dtype of keys and values.
        selected: keys that a query selects at most (`index_topk`); None: it attends to all that it sees.
        gathered_width: numbers of a token that such a layer gathers: its latent, or its keys and values.
        index_width: width of an index key.
        index_heads: heads of the indexer.
    """

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
    selected: int | None = None
    gathered_width: int = 576
    index_width: int = 128
    index_heads: int = 64

    @property
    def mask_spec(self) -> MaskSpec:
        """The mask as a layer asks for it."""
        left = UNLIMITED if self.window is None else self.window - 1
        return MaskSpec(left, 0 if self.causal else left, self.chunk or 0)


@dataclass(frozen=True, eq=False)
class Traffic:
    """Bytes from rank (row) to rank (column) of one layer, [P, P] each; rank = ring rank * U + ulysses rank.

    Attributes:
        ring_forward: keys and values.
        ring_backward: keys and values again, and their gradients.
        ulysses_forward: all-to-alls of the forward.
        ulysses_backward: all-to-alls of the backward.
    """

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
    """The numbers of a case.

    Attributes:
        case: the sizes.
        layout: the layout of its batch.
        reason: why these degrees.
        mask: the mask.
        plans: ring schedule of each ring rank.
        shares: heads of each ulysses rank.
        traffic: bytes between ranks.
    """

    case: Case
    layout: SequenceLayout
    reason: str
    mask: Mask
    plans: list[RingSchedule]
    shares: tuple[HeadShare, ...]
    traffic: Traffic

    @property
    def unpruned(self) -> IntArray:
        """Ring bytes that a rank would send if whole blocks went around, [U] by ulysses rank."""
        rows = (len(self.plans) - 1) * self.plans[0].num_tokens
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
    if ring > MOST_RING:
        raise UspConfigError(
            f"ulysses {ulysses} x ring {ring} ({reason})",
            rule=f"every pair of ring ranks is looked at, up to a ring of {MOST_RING}",
            remedy=f"take fewer ranks, or --ulysses of at least {-(-case.ranks // MOST_RING)}; hf-usp plan takes any "
            "number of GPUs",
        )
    shares = split_heads(case.heads, case.kv_heads, ulysses)
    per_node = ring_per_node(range(case.ranks), ulysses, case.ranks_per_node or case.ranks)
    mesh = UspMesh(ring, ulysses, 0, 0, tuple(range(case.ranks)), None, None, None, ring_per_node=per_node)
    starts = np.concatenate(([0], np.cumsum(case.documents or (case.tokens,))))[:-1]
    rows = np.arange(case.batch)[:, None] * case.tokens
    documents = Documents.from_bounds(np.append((rows + starts).ravel(), case.batch * case.tokens))
    layout = make_layout(documents, case.batch, case.tokens, mesh, case.order, (case.mask_spec,))
    plans = [layout.ring_schedule(case.mask_spec, rank) for rank in range(ring)]
    traffic = count_traffic(plans, shares, case)
    return Explanation(case, layout, reason, layout.mask(case.mask_spec), plans, shares, traffic)


@dataclass(frozen=True)
class SelectionCosts:
    """Costs of a layer whose queries select their keys; one figure a rank.

    Attributes:
        attended: (query, key) pairs of a head.
        scored: (query, key) pairs of an index head.
        forward: bytes that a rank sends.
        backward: bytes that a rank sends in the backward.
    """

    attended: IntArray
    scored: IntArray
    forward: int
    backward: int


def selection_costs(it: Explanation) -> SelectionCosts | None:
    """The costs of a layer that selects; None where every query selects all that it sees."""
    case, layout = it.case, it.layout
    if case.selected is None or longest_document(layout.documents) <= case.selected:
        return None
    held, item = layout.positions_per_rank(), DTYPES[case.dtype].itemsize
    sent = selection_bytes(
        layout.batch * layout.local_length, case.ranks, case.gathered_width * item, case.index_width * item
    )
    attended = np.array([selected_area(it.mask, positions, case.selected) for positions in held])
    return SelectionCosts(attended, np.array([it.mask.area(positions) for positions in held]), *sent)


def check_sizes(case: Case) -> None:
    """Refuse what is not a size, by name."""
    names = ("tokens", "ranks", "heads", "kv_heads", "head_dim", "batch", "window", "chunk", "ranks_per_node")
    check_positive_int(**{name: getattr(case, name) for name in names})
    of_selections = ("selected", "gathered_width", "index_width", "index_heads")
    check_positive_int(**{name: getattr(case, name) for name in of_selections})
    check_positive_int(most=MOST_RANKS, ranks=case.ranks)
    check_positive_int(most=MOST_HEADS, heads=case.heads, kv_heads=case.kv_heads)
    check_positive_int(most=1 << 20, head_dim=case.head_dim)
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
    check_dtype(case.dtype)


def count_traffic(plans: Sequence[RingSchedule], shares: Sequence[HeadShare], case: Case) -> Traffic:
    """Who sends how much to whom in one layer."""
    ulysses, size = len(shares), len(plans) * len(shares)
    ring_forward, ring_backward, uly_forward, uly_backward = (np.zeros((size, size), dtype=np.int64) for _ in range(4))
    head = case.head_dim * DTYPES[case.dtype].itemsize
    for plan in plans:
        first, tokens = plan.rank * ulysses, plan.num_tokens // ulysses
        for u, mine in enumerate(shares):
            me, row = first + u, kv_row_bytes(mine, case)
            for step in plan.steps:
                ring_forward[me, step.send_rank * ulysses + u] += step.num_sent * row
                ring_backward[me, step.send_rank * ulysses + u] += step.num_sent * row
                ring_backward[me, step.recv_rank * ulysses + u] += step.num_received * row
            for v, theirs in enumerate(shares):
                if u != v:
                    # Out: their heads of my tokens. Back: my heads of their tokens. The gradients mirror both.
                    q_k_v = (theirs.num_query + 2 * theirs.num_kv, mine.num_query + 2 * mine.num_kv)
                    uly_forward[me, first + v] = tokens * head * (q_k_v[0] + mine.num_query)
                    uly_backward[me, first + v] = tokens * head * (theirs.num_query + q_k_v[1])
    return Traffic(ring_forward, ring_backward, uly_forward, uly_backward)


def messages(plan: RingSchedule, ulysses: int) -> tuple[int, int]:
    """Messages of one layer, forward and backward: (point to point along the ring, all-to-alls along ulysses)."""
    returned = sum(step.num_received > 0 for step in plan.steps)
    return 2 * plan.messages + returned, 4 if ulysses > 1 else 0
