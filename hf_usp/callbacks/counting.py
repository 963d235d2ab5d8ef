"""Tokens, useful work, balance and bytes sent of a training step, counted from its layouts.

Nothing here talks to other ranks or looks at a clock. Work is *model* work: what the mathematics asks for, a multiply
and an add being two operations; recomputation does not count (PaLM, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ..batch.context import AttentionShape, ForwardContext, IndexShape, SelectionShape
from ..batch.layout import SequenceLayout
from ..compat import full_shape
from ..models.backbone import find_backbone
from ..sharding.heads import HeadShare, split_heads
from ..sharding.intervals import IntArray
from ..sharding.selections import selected_area, selection_bytes


@dataclass
class StepCounts:
    """Sums over micro-batches of this rank's context-parallel group.

    Attributes:
        tokens: tokens without padding.
        places: tokens with padding.
        pairs: (query, key) pairs x heads x (key width + value width) of all layers.
        path: the same of the busiest rank, times the number of ranks.
        sent: bytes that this rank sent for attention, recomputed layers included.
        micro_batches: number of micro-batches.
    """

    tokens: int = 0
    places: int = 0
    pairs: float = 0.0
    path: float = 0.0
    sent: int = 0
    micro_batches: int = 0


@dataclass
class Seen:
    """One micro-batch.

    Attributes:
        context: of its forward; its counts go on in the backward.
        forward: attention calls of its forward.
        selections: those over selected keys.
        index_keys: calls of indexers in its forward.
    """

    context: ForwardContext
    forward: Counter[AttentionShape] = field(default_factory=Counter)
    selections: Counter[SelectionShape] = field(default_factory=Counter)
    index_keys: Counter[IndexShape] = field(default_factory=Counter)

    @classmethod
    def after_forward(cls, context: ForwardContext) -> Seen:
        """The counts of a forward that is over."""
        return cls(context, context.attention_calls.copy(), context.selections.copy(), context.index_keys.copy())


def count(seen: Seen, counts: StepCounts) -> None:
    """Add a micro-batch whose backward is over."""
    layout = seen.context.layout
    documents = layout.documents
    counts.tokens += int((documents.last - documents.first).sum())
    counts.places += layout.batch * layout.padded
    counts.micro_batches += 1
    mesh = layout.mesh
    for shape, calls in seen.forward.items():
        shares = split_heads(shape.heads, shape.kv_heads, mesh.ulysses_degree)
        areas, width = mask_areas(layout, shape), shape.width + shape.value_width
        counts.pairs += float(calls * areas.sum() * shape.heads * width)
        busiest = max(share.num_query for share in shares)
        counts.path += float(calls * areas.max() * busiest * width * mesh.size)
        forward, backward = bytes_sent(layout, shape, shares)
        counts.sent += seen.context.attention_calls[shape] * forward + calls * backward
    _count_selections(seen, counts)


def _count_selections(seen: Seen, counts: StepCounts) -> None:
    """Calls over selected keys.

    An indexer's products are forward only, a third of what the report makes of pairs. Every rank scores all keys for
    each of its queries: they have the same work.
    """
    layout = seen.context.layout
    local, ranks = layout.batch * layout.local_length, layout.mesh.size
    held = layout.positions_per_rank()
    for shape, calls in seen.selections.items():
        areas = np.array([selected_area(layout.mask(), positions, shape.selected) for positions in held])
        work = calls * shape.heads * (shape.width + shape.value_width)
        counts.pairs += float(work * areas.sum())
        counts.path += float(work * areas.max() * ranks)
        row = shape.kv_heads * (shape.width + (0 if shape.latents else shape.value_width)) * shape.dtype.itemsize
        forward, backward = selection_bytes(local, ranks, row, 0)
        counts.sent += seen.context.selections[shape] * forward + calls * backward
    for index, calls in seen.index_keys.items():
        area = sum(layout.mask().area(positions) for positions in held)
        counts.pairs += calls * index.heads * index.width * area / 3
        counts.path += calls * index.heads * index.width * area / 3
        sent = selection_bytes(local, ranks, 0, index.width * index.dtype.itemsize)[0]
        counts.sent += seen.context.index_keys[index] * sent


def mask_areas(layout: SequenceLayout, shape: AttentionShape) -> IntArray:
    """(query, key) pairs that each ring rank computes for one head [R]; worked out once per batch and mask."""

    def make() -> IntArray:
        mask = layout.mask(shape.mask_spec)
        return np.array([mask.area(shard) for shard in layout.ring_shards()])

    return layout.memoize(("areas", shape.mask_spec), make)


def bytes_sent(layout: SequenceLayout, shape: AttentionShape, shares: tuple[HeadShare, ...]) -> tuple[int, int]:
    """Bytes that this rank sends in one call of attention, forward and backward."""
    mesh, plan = layout.mesh, layout.ring_schedule(shape.mask_spec)
    mine, tokens = shares[mesh.ulysses_rank], layout.batch * layout.local_length
    key_value = shape.width + shape.value_width
    row = mine.num_kv * key_value
    # Ring: keys and values of rows that others see; backward again, and the gradients of rows that came.
    forward, backward = plan.rows_sent * row, (plan.rows_sent + plan.rows_received) * row
    for rank, theirs in enumerate(shares):
        if rank == mesh.ulysses_rank:
            continue
        # Out: q, k, v of their heads, of my tokens; back: the output of mine, of their tokens. The gradients mirror it.
        forward += tokens * (theirs.num_query * shape.width + theirs.num_kv * key_value)
        forward += tokens * mine.num_query * shape.value_width
        backward += tokens * (mine.num_query * shape.width + mine.num_kv * key_value)
        backward += tokens * theirs.num_query * shape.value_width
    return forward * shape.dtype.itemsize, backward * shape.dtype.itemsize


def work_per_token(model: PreTrainedModel) -> float:
    """Floating-point operations of the weights' products for one token, forward and backward.

    Two for every weight forward, two for the gradient of what came in, two for that of a weight that is trained. An
    embedding is a look-up; of experts only those count that a token is routed to. Attention's pairs come on top.
    """
    head = model.get_output_embeddings()
    body = find_backbone(model).module
    look_up = body.get_input_embeddings().weight
    weights = {id(p): p for p in body.parameters() if p is not look_up}
    weights |= {id(p): p for p in head.parameters()} if head is not None else {}
    total = 0.0
    for p in weights.values():
        shape = full_shape(p)
        if len(shape) >= 2:
            used = float(np.prod(shape)) * _routed(shape, model.config.get_text_config())
            total += used * (6 if p.requires_grad else 4)
    return total


def _routed(shape: Any, config: Any) -> float:
    """The share of a weight that one token meets: of [experts, ...] those that it is routed to."""
    experts = {getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")}
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / shape[0] if len(shape) == 3 and chosen and shape[0] in experts else 1.0
