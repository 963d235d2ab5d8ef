"""One forward of one model: its layout, its options, its flags, and counters of what its layers did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..kernels import Request, Softmax
from ..utils.tensors import opaque_to_fsdp
from .layout import CAUSAL, KeptTokens, MaskSpec, SequenceLayout

if TYPE_CHECKING:
    from ..planner.workload import TrainingStep


@dataclass(frozen=True)
class ShardOptions:
    """How a run shards its batches.

    Attributes:
        order: order of tokens: "auto", "contiguous", "zigzag" or "balanced".
        mask_specs: masks of the layers; "auto" and "balanced" look at them.
        kernel: name of the kernel; None: the best installed.
        positions: function from a full batch without position_ids to [B, S]; None: 0, 1, 2 ... They do not separate
            documents.
        largest_position: whether the model looks at the largest position of a batch.
        pass_states: whether recurrent layers pass states (True) or exchange heads for tokens (False); None: the
            cheaper one.
    """

    order: str = "auto"
    mask_specs: tuple[MaskSpec, ...] = (CAUSAL,)
    kernel: str | None = None
    positions: Callable[[Mapping[str, Any]], Tensor | None] | None = None
    largest_position: bool = True
    pass_states: bool | None = None


class AttentionShape(NamedTuple):
    """One attention call, as it is counted.

    Attributes:
        mask_spec: its mask.
        heads: query heads.
        kv_heads: key and value heads.
        width: width of a query or key head.
        value_width: width of a value head.
        dtype: dtype of queries, keys and values.
    """

    mask_spec: MaskSpec
    heads: int
    kv_heads: int
    width: int
    value_width: int
    dtype: torch.dtype


class KeepsKeys(Protocol):
    """A cache that a sharded forward fills (`models/generation`)."""

    def forget(self, mask_spec: MaskSpec) -> None:
        """Drop of the layer that has just attended what later tokens do not see under its mask."""


class SelectionShape(NamedTuple):
    """One attention call over selected keys, as it is counted.

    Attributes:
        heads: query heads.
        kv_heads: key and value heads that are gathered; 1 for latents.
        width: width of what is gathered as a key.
        value_width: width of a value; latents hold it in their keys.
        selected: keys that each query has selected at most.
        latents: whether keys are latents, of which values are a part.
        dtype: dtype of queries, keys and values.
    """

    heads: int
    kv_heads: int
    width: int
    value_width: int
    selected: int
    latents: bool
    dtype: torch.dtype


class IndexShape(NamedTuple):
    """One call of an indexer, as it is counted.

    Attributes:
        heads: index heads.
        width: width of an index key.
        dtype: its dtype.
    """

    heads: int
    width: int
    dtype: torch.dtype


@dataclass(eq=False)
class Interception:
    """A layer taken apart at its attention: who answers its attention calls in the place of the mesh.

    Attributes:
        answer: function from q_BLHD, k_BLGD, v_BLGE and sinks_H (or None), mask and softmax to out_BLHE.
        tokens: which local tokens of each row the layer was given.
    """

    answer: Callable[[Sequence[Tensor | None], MaskSpec, Softmax], Tensor]
    tokens: slice


@opaque_to_fsdp
@dataclass(eq=False)
class ForwardContext:
    """One forward of one model over one sharded batch. Layers find it with `sharded_tensors.context_of`.

    Attributes:
        layout: which rank holds which token.
        options: how the batch was sharded.
        manual_loop: whether `hf_usp.shard` made it for a hand-written loop, whose model has no hooks.
        has_shift_labels: whether the caller passed `shift_labels`.
        wants_router_logits: whether the caller asked for `output_router_logits`.
        gathers_outputs: whether per-token outputs are gathered after the forward.
        of_backbone: whether the base model of a causal LM was called by itself.
        whole_layers: whether somebody looks at the modules inside layers: none computes in chunks.
        way: how this forward saves memory, where that is chosen for each; None: by the options.
        interception: of the attention calls of a layer that is run on some of its tokens.
        kept: the tokens whose logits the caller wants (`logits_to_keep`); None: all.
        cache: the cache that this forward, a prefill, fills; None in every other one.
        attention_calls: attention calls by shape; those of recomputed layers count again.
        selections: attention calls over selected keys; none where no document is longer than a selection.
        index_keys: calls of indexers, whose keys were gathered.
        recurrent_calls: calls of kernels of recurrent layers.
        kernels: name of the kernel that computes each kind of call, for the log.
    """

    layout: SequenceLayout
    options: ShardOptions = ShardOptions()
    manual_loop: bool = False
    has_shift_labels: bool = False
    wants_router_logits: bool = False
    gathers_outputs: bool = False
    of_backbone: bool = False
    whole_layers: bool = False
    way: TrainingStep | None = None
    interception: Interception | None = None
    kept: KeptTokens | None = None
    cache: KeepsKeys | None = field(default=None, repr=False)
    attention_calls: Counter[AttentionShape] = field(default_factory=Counter, repr=False)
    selections: Counter[SelectionShape] = field(default_factory=Counter, repr=False)
    index_keys: Counter[IndexShape] = field(default_factory=Counter, repr=False)
    recurrent_calls: int = 0
    kernels: dict[Request, str] = field(default_factory=dict, repr=False)

    def intercepted(self, interception: Interception) -> ForwardContext:
        """The same forward for a layer that is taken apart; the counters are the same objects."""
        taken_apart = copy(self)
        taken_apart.interception = interception
        return taken_apart

    @property
    def reached_a_layer(self) -> bool:
        """Whether some layer of the model worked on the layout."""
        return bool(self.attention_calls or self.selections) or self.recurrent_calls > 0
