"""Layers that attend to windows of tokens compressed into one entry each (DeepSeek-V4), on a sharded sequence.

Beside a sliding window a query sees compressed entries of earlier tokens: all, or those that an indexer selects. The
layer's own cache protocol says what that needs: `store_compression_weights` takes what is compressed, and `update`
the keys of the sliding window. In a sharded forward a layer is lent a cache that answers both with the tokens of all
ranks. Every rank compresses the whole row, which is a weighted sum over each window; queries stay where they are.

The compressor counts windows from the start of the row: it is told neither of padding nor of documents.

Shape suffixes: B rows, L tokens of a row on this rank, S tokens of a row, T compressed entries, D width, W keys of a
sliding window, K entries that a query sees.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..attention.selected import Selection, attend_to_selected, marked_keys, queries_per_chunk
from ..batch.context import ForwardContext, SelectionShape
from ..batch.layout import MaskSpec
from ..batch.sharded_tensors import ShardedMask, context_of
from ..batch.unshard import unshard
from ..utils.dtypes import as_autocast
from ..utils.tensors import opaque_to_fsdp
from .indexed_attention import refuse_other_rows, seen_intervals
from .pickling import NotSaved
from .unsharded import cache_keyword

PROTOCOL = "store_compression_weights"


def compresses(module: Any) -> bool:
    """Whether a module's own forward hands tokens to a cache that collects what is compressed."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None) if isinstance(module, nn.Module) else None
    return code is not None and PROTOCOL in code.co_names


@opaque_to_fsdp
@dataclass(frozen=True, eq=False)
class CompressedMask(ShardedMask):
    """The mask of a layer that also sees compressed entries.

    Attributes:
        handle: of the context of the forward.
        mask_spec: the mask of its sliding window.
        biases: what the compressor has said: 0 where a local query sees an entry, else -inf [B, 1, L, T]; empty without
            entries.
        most: entries that a query selects at most; None: it sees all earlier ones.
    """

    handle: Tensor
    mask_spec: MaskSpec
    biases: list[Tensor]
    most: int | None


class CompressedLayers(NotSaved):
    """The layers of one prepared model that attend to compressed entries."""

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[Any] = [m for m in model.modules() if compresses(getattr(m, "compressor", None))]
        self.indexers = [m.compressor.indexer for m in self.layers if hasattr(m.compressor, "indexer")]
        self.mask: CompressedMask | None = None  # of the layer that runs
        for indexer in self.indexers:
            indexer.forward = MethodType(_ChunkedIndexer(type(indexer).forward), indexer)
        self.handles = [layer.register_forward_pre_hook(self._enter, with_kwargs=True) for layer in self.layers]
        self.handles += [layer.compressor.register_forward_hook(self._keep_bias) for layer in self.layers]

    def release(self) -> None:
        for handle in self.handles:
            handle.remove()
        for indexer in self.indexers:
            del indexer.forward
        self.layers, self.indexers = [], []

    def validate_batch(self, batch: Mapping[str, Any]) -> None:
        """Refuse documents and left padding: windows are counted from the start of the row."""
        if self.layers:
            refuse_other_rows(self.layers[0].compressor, batch)

    @torch.compiler.disable
    def _enter(self, layer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        self.mask = None
        context, mask = context_of(*args, *kwargs.values()), kwargs.get("attention_mask")
        if context is None or not isinstance(mask, ShardedMask):
            return None
        indexer = getattr(layer.compressor, "indexer", None)
        self.mask = CompressedMask(mask.handle, mask.mask_spec, [], getattr(indexer, "index_topk", None))
        name = cache_keyword(type(layer).forward)
        return args, {
            **kwargs,
            "attention_mask": self.mask,
            name: _TokensOfAllRanks(context, layer.compressor.compress_rate),
        }

    @torch.compiler.disable
    def _keep_bias(self, compressor: nn.Module, args: tuple, output: tuple[Tensor, Tensor | None]) -> None:
        if self.mask is not None and output[1] is not None:
            self.mask.biases.append(output[1])


class _LayerCache:
    """Stands where a layer's cache, and the cache's entry for the layer, stand."""

    def __init__(self, context: ForwardContext, rate: int) -> None:
        self.context, self.rate = context, rate

    @property
    def layers(self) -> Any:
        return self

    def __getitem__(self, layer_idx: int) -> Any:
        return self

    def update_overlap_state(self, *args: Any) -> tuple[None, None]:
        """There is no window before the first of the row."""
        return None, None


class _TokensOfAllRanks(_LayerCache):
    """Answers with the tokens of all ranks, in the order of their row."""

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys that are the values, too: [B, 1, L, D] -> [B, 1, S, D]."""
        whole = unshard(keys, self.context.layout, dim=2)
        return whole, whole

    def store_compression_weights(self, name: str, kv: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, int]:
        """[B, L, X] both -> those of all tokens that fill windows, and the first of these tokens."""
        both = unshard(torch.cat([kv, gate.to(kv.dtype)], dim=-1), self.context.layout)
        usable = both.shape[1] // self.rate * self.rate
        kv, gate = both[:, :usable].chunk(2, dim=-1)
        return kv, gate, 0

    def update_compressor_states(self, name: str, compressed: Tensor) -> Tensor:
        return compressed


class _EntriesMadeError(Exception):
    """The indexer has compressed all windows; the rest of its work comes chunk by chunk."""

    def __init__(self, compressed: Tensor) -> None:
        super().__init__()
        self.compressed = compressed


class _StopAtEntries(_TokensOfAllRanks):
    def update_compressor_states(self, name: str, compressed: Tensor) -> Tensor:
        raise _EntriesMadeError(compressed)


class _Entries(_LayerCache):
    """Nothing more to compress: the entries are there [B, T, D]."""

    def __init__(self, compressed: Tensor) -> None:
        self.compressed = compressed

    def store_compression_weights(self, name: str, kv: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, int]:
        return kv[:, :0], gate[:, :0], 0

    def update_compressor_states(self, name: str, compressed: Tensor) -> Tensor:
        return self.compressed


class _ChunkedIndexer(NotSaved):
    """The forward of an indexer of entries: its own code, in a sharded forward over chunks of this rank's queries."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original, self.signature, self.__name__ = original, inspect.signature(original), "forward"

    @torch.compiler.disable
    def __call__(self, indexer: Any, *args: Any, **kwargs: Any) -> Tensor:
        given = {n: x for n, x in self.signature.bind(indexer, *args, **kwargs).arguments.items() if x is not indexer}
        name = next((name for name, x in given.items() if isinstance(x, _TokensOfAllRanks)), None)
        if name is None:
            return cast(Tensor, self.original(indexer, *args, **kwargs))
        lent = given.pop(name)
        length, chosen = lent.context.layout.local_length, []
        with torch.no_grad():
            try:
                self.original(indexer, **given, **{name: _StopAtEntries(lent.context, indexer.compress_rate)})
            except _EntriesMadeError as made:
                entries = made.compressed
            step = queries_per_chunk(entries.shape[0] * max(1, entries.shape[1]) * indexer.num_heads, length)
            for a in range(0, length, step):
                parts = {n: x[:, a : a + step] if isinstance(x, Tensor) else x for n, x in given.items()}
                chosen.append(self.original(indexer, **parts, **{name: _Entries(entries)}))
        return torch.cat(chosen, dim=1)


def attend_compressed(
    query: Tensor, key: Tensor, mask: CompressedMask, context: ForwardContext, sinks: Tensor | None, scale: float
) -> Tensor:
    """Attention to a sliding window and to compressed entries: query [B, H, L, D], key [B, 1, S + T, D], whose values
    are the keys -> [B, L, H, D]."""
    layout = context.layout
    first, last = seen_intervals(layout, mask.mask_spec, query.device)
    left = mask.mask_spec.window_left
    widest = layout.length if left < 0 else min(left + 1, layout.length)
    window_BLW = last[..., None] - 1 - torch.arange(widest, device=query.device)
    index = window_BLW.masked_fill(window_BLW < first[..., None], -1)
    for bias in mask.biases:
        entries = marked_keys((bias == 0)[:, 0], mask.most or bias.shape[-1])
        index = torch.cat([index, (entries + layout.length).masked_fill(entries < 0, -1)], dim=-1)
    everything = torch.full_like(first, key.shape[2])
    selection = Selection(index[:, None].to(torch.int32), torch.zeros_like(first), everything)
    query, key = as_autocast(query, key)
    shape = SelectionShape(query.shape[1], 1, key.shape[-1], key.shape[-1], index.shape[-1], True, query.dtype)
    context.selections[shape] += 1
    return attend_to_selected(query, key, key.shape[-1], sinks, selection, scale).transpose(1, 2).contiguous()
