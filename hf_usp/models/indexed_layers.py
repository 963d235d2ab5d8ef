"""Layers whose attention selects its keys by an indexer, on a sharded sequence: the models' own code, unchanged.

The cache protocol of Transformers says what such a layer needs of earlier tokens: it hands index keys to
`cache.update_indexer` (or `update_index` of the cache's layer), keys and values, still compressed, to `cache.update`,
and goes on with those of all tokens so far. In a sharded forward a layer gets a cache that answers with the tokens of
all ranks, in the order of their row: gathered forward, reduce-scattered backward. An indexer is what calls the
protocol; no model is known by name. Its own forward runs over chunks of this rank's queries. No gradient flows through
a selection of keys.

Where no document of a batch is longer than what a query may select, every query selects all that it sees: no key is
gathered, no indexer runs, and attention is the usual one.

Shape suffixes: B rows, L tokens of a row on this rank, S tokens of a row, C queries of a chunk, G kv heads, D width.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..attention.selected import marked_keys, queries_per_chunk
from ..batch.context import ForwardContext, IndexShape
from ..batch.sharded_tensors import ShardedMask, context_of
from ..batch.unshard import unshard
from ..errors import UspModelError
from ..sharding.selections import longest_document
from .compressed_layers import compresses
from .indexed_attention import IndexedMask, refuse_lost_selection, refuse_other_rows
from .pickling import NotSaved
from .unsharded import cache_keyword

Function = Callable[..., Any]

# Methods that an indexer calls on its cache, or on the cache's layer.
PROTOCOL = {"update_indexer", "update_index"}
# Attributes of indexers that say how many visible keys a query may select, and small numbers for a short batch.
SMALL = {
    "index_topk": {"index_topk": 3},
    "block_topk": {"block_topk": 1, "compress_ratio": 2, "token_budget": 2},
    "topk_blocks": {"topk_blocks": 2, "block_size": 2, "local_blocks": 1},
}


def is_indexer(module: nn.Module) -> bool:
    """Whether a module's own forward hands keys to a cache of index keys."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and not PROTOCOL.isdisjoint(code.co_names)


def selects_keys(model: nn.Module) -> bool:
    """Whether some layer of a model selects its keys."""
    return any(map(is_indexer, model.modules()))


def selects_all_of(indexer: Any) -> int:
    """A query that sees at most so many keys selects all of them; 0 where that is not known."""
    if hasattr(indexer, "index_topk"):
        return int(indexer.index_topk)
    if hasattr(indexer, "block_topk"):
        return int(indexer.block_topk * indexer.compress_ratio)
    if hasattr(indexer, "topk_blocks"):
        return int(indexer.topk_blocks * indexer.block_size)
    return 0


@contextmanager
def small_selections(model: nn.Module) -> Iterator[bool]:
    """Indexers select so few keys that a short batch shows it. Yields whether the model has any."""
    indexers = [m for m in model.modules() if is_indexer(m) or (compresses(m) and hasattr(m, "index_topk"))]
    before = [(indexer, dict(indexer.__dict__)) for indexer in indexers]
    for indexer in indexers:
        for name, numbers in SMALL.items():
            if hasattr(indexer, name):
                indexer.__dict__.update(numbers)
    try:
        yield bool(indexers)
    finally:
        for indexer, attributes in before:
            indexer.__dict__.update(attributes)


def heeds_masks(indexer: nn.Module) -> bool:
    """Whether an indexer is told which keys a query sees. Else all earlier slots of the row compete, pads too."""
    return "attention_mask" in inspect.signature(type(indexer).forward).parameters


class IndexedLayers(NotSaved):
    """The layers of one prepared model that select their keys, and their indexers."""

    def __init__(self, model: nn.Module) -> None:
        self.indexers: list[Any] = [module for module in model.modules() if is_indexer(module)]
        self.layers: list[Any] = [m for m in model.modules() if hasattr(m, "indexer")] if self.indexers else []
        self.latents = False  # whether the layer that runs keeps latents instead of expanding them
        for indexer in self.indexers:
            indexer.forward = MethodType(ChunkedIndexer(type(indexer).forward), indexer)
        for layer in self.layers:
            if _has_latents(layer):
                layer.expand_kv = MethodType(_KeepLatents(self, type(layer).expand_kv), layer)
        self.handles = [layer.register_forward_pre_hook(self._enter, with_kwargs=True) for layer in self.layers]

    def release(self) -> None:
        for handle in self.handles:
            handle.remove()
        for indexer in self.indexers:
            del indexer.forward
        for layer in self.layers:
            layer.__dict__.pop("expand_kv", None)
        self.indexers, self.layers = [], []

    def validate_batch(self, batch: Mapping[str, Any]) -> None:
        """Refuse documents and left padding for indexers that are told of neither."""
        blind = next((indexer for indexer in self.indexers if not heeds_masks(indexer)), None)
        if blind is not None:
            refuse_other_rows(blind, batch)

    @torch.compiler.disable
    def _enter(self, layer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Lend the layer a mask that records its selection, and a cache that answers for all ranks."""
        self.latents = False
        context = context_of(*args, *kwargs.values())
        mask = kwargs.get("attention_mask")
        # A layer without an indexer of its own may go on with the selection of a layer before it.
        if layer.indexer is None and kwargs.get("prev_topk_indices") is None:
            return None
        if context is None or not isinstance(mask, ShardedMask):
            return None
        blind = not all(map(heeds_masks, self.indexers))
        layout = context.layout
        most = layout.length if blind else layout.memoize("longest", lambda: longest_document(layout.documents))
        selecting = most > min(map(selects_all_of, self.indexers))
        self.latents = selecting and _has_latents(layer)
        if self.latents:
            refuse_dropout(layer)
        kwargs = {**kwargs, "attention_mask": IndexedMask(mask.handle, mask.mask_spec, selecting, self.latents)}
        kwargs[cache_keyword(type(layer).forward)] = LentCache(context, selecting)
        return args, kwargs


def _has_latents(layer: Any) -> bool:
    """Whether keys and values of a layer are expanded from latents by a matrix that can be absorbed."""
    expansion = getattr(layer, "kv_b_proj", None)
    return hasattr(type(layer), "expand_kv") and getattr(expansion, "bias", None) is None


class _KeepLatents(NotSaved):
    """`expand_kv` of a layer: what was gathered stays compressed where attention works on latents."""

    def __init__(self, layers: IndexedLayers, original: Function) -> None:
        self.layers, self.original = layers, original
        self.__name__ = "expand_kv"

    def __call__(self, layer: nn.Module, latent_B1SR: Tensor, rotary_B1SD: Tensor) -> tuple[Tensor, Tensor]:
        if not self.layers.latents:
            return self.original(layer, latent_B1SR, rotary_B1SD)
        return torch.cat([latent_B1SR, rotary_B1SD.to(latent_B1SR.dtype)], dim=-1), latent_B1SR


def refuse_dropout(layer: Any) -> None:
    """Refuse dropout inside the expansion of latents (LoRA's): attention asks for its matrix once, not per token."""
    dropping = [m for m in layer.kv_b_proj.modules() if isinstance(m, nn.Dropout) and m.training and m.p > 0]
    if dropping:
        raise UspModelError(
            f"dropout {dropping[0].p} inside kv_b_proj of {type(layer).__name__}, whose queries select their keys",
            rule="latents are attended to as they are: the matrix that expands them is one for all tokens",
            remedy="set lora_dropout=0.0, or leave kv_b_proj out of the adapter's target_modules",
        )


class LentCache:
    """Stands where a layer's cache stands: answers with keys and values of all ranks, in the order of the row.

    Without a selection it answers with what it gets.
    """

    def __init__(self, context: ForwardContext, selecting: bool) -> None:
        self.context, self.layout, self.selecting = context, context.layout, selecting

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """[B, G, L, D], [B, G, L, E] -> [B, G, S, D], [B, G, S, E], in one message."""
        if not self.selecting:
            return keys, values
        widths = [keys.shape[-1], values.shape[-1]]
        dtype = torch.promote_types(keys.dtype, values.dtype)
        both = torch.cat([keys.to(dtype), values.to(dtype)], dim=-1)
        k, v = unshard(both, self.layout, dim=2).split(widths, dim=-1)
        return k.to(keys.dtype), v.to(values.dtype)


class _IndexCache(ABC):
    """Stands where an indexer's cache stands. Some indexers ask the cache, others its layer."""

    @property
    def layers(self) -> Any:
        return self

    def __getitem__(self, layer_idx: int) -> Any:
        return self

    @abstractmethod
    def update_indexer(self, keys_BLD: Tensor, *args: Any) -> Tensor:
        """Take the keys of some tokens; returns those of all."""

    def update_index(self, keys_B1LD: Tensor) -> Tensor:
        return self.update_indexer(keys_B1LD.squeeze(1)).unsqueeze(1)


class _KeysMadeError(Exception):
    """The indexer has made its keys; the rest of its work comes chunk by chunk."""

    def __init__(self, keys: Tensor) -> None:
        super().__init__()
        self.keys = keys


class _StopAtKeys(_IndexCache):
    def update_indexer(self, keys_BLD: Tensor, *args: Any) -> Tensor:
        raise _KeysMadeError(keys_BLD)


class _AllKeys(_IndexCache):
    def __init__(self, keys_BSD: Tensor) -> None:
        self.keys_BSD = keys_BSD

    def update_indexer(self, keys_BCD: Tensor, *args: Any) -> Tensor:
        return self.keys_BSD


class ChunkedIndexer(NotSaved):
    """The forward of an indexer: its own code, in a sharded forward over chunks of this rank's queries and all keys."""

    def __init__(self, original: Function) -> None:
        self.original, self.__name__ = original, "forward"  # pickled, the bound method is the indexer's own
        self.signature, self.cache = inspect.signature(original), cache_keyword(original)
        # QSA takes the rotary embedding of all keys, of which the last are the queries'; others that of the queries.
        self.rotary_of_all = "full_cos" in inspect.unwrap(original).__code__.co_varnames

    @torch.compiler.disable
    def __call__(self, indexer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        given = self.signature.bind(indexer, *args, **kwargs).arguments
        given = {name: x for name, x in given.items() if x is not indexer}
        lent = given.get(self.cache)
        if not isinstance(lent, LentCache):
            return cast(Tensor, self.original(indexer, *args, **kwargs))
        hidden = next(x for x in given.values() if isinstance(x, Tensor))
        if not lent.selecting:  # every query selects all that it sees
            return torch.empty(*hidden.shape[:2], 0, dtype=torch.int32, device=hidden.device)
        with torch.no_grad():
            return self._select(indexer, given, lent, hidden)

    def _select(self, indexer: nn.Module, given: dict[str, Any], lent: LentCache, hidden: Tensor) -> Tensor:
        """Selected tokens [B, L, K], -1 for none, or blocks [B, G, L, K]."""
        layout, length = lent.layout, lent.layout.local_length
        rotary = {
            name: tuple(unshard(x.expand(layout.batch, -1, -1), layout) for x in pair)
            for name, pair in given.items()
            if self.rotary_of_all and isinstance(pair, tuple)
        }

        def part(name: str, x: Any, a: int, b: int) -> Any:
            if isinstance(x, IndexedMask):
                return x.dense(layout, a, b, hidden.device)
            if name in rotary:  # the keys' first, then the queries'
                return tuple(
                    torch.cat([y, own[:, a:b].expand(len(y), -1, -1)], 1)
                    for y, own in zip(rotary[name], x, strict=True)
                )
            if isinstance(x, tuple):
                return tuple(part("", y, a, b) for y in x)
            of_tokens = isinstance(x, Tensor) and x.ndim > 1 and x.shape[1] == length and len(x) in (1, layout.batch)
            return x[:, a:b] if of_tokens else x

        whole = {name: x if isinstance(x, IndexedMask) else part(name, x, 0, length) for name, x in given.items()}
        try:
            self.original(indexer, **whole | {self.cache: _StopAtKeys()})
        except _KeysMadeError as made:
            keys = _AllKeys(unshard(made.keys, layout))
            lent.context.index_keys[IndexShape(_heads(indexer), made.keys.shape[-1], made.keys.dtype)] += 1
        step, chosen = queries_per_chunk(layout.batch * layout.length * _heads(indexer), length), []
        for a in range(0, length, step):
            parts = {name: part(name, x, a, min(a + step, length)) for name, x in given.items()}
            selected = self.original(indexer, **parts | {self.cache: keys})
            chosen.append(_as_index(indexer, selected))
        most = max(x.shape[-1] for x in chosen)
        return torch.cat([nn.functional.pad(x, (0, most - x.shape[-1]), value=-1) for x in chosen], dim=-2)


def _heads(indexer: nn.Module) -> int:
    """Index heads, which the scores of a chunk have."""
    names = ("n_heads", "index_n_heads", "num_heads")
    return next((int(getattr(indexer, name)) for name in names if hasattr(indexer, name)), 1)


def _as_index(indexer: Any, selected: Any) -> Tensor:
    """A selection as indices [..., C, K]; of a boolean one [B, 1, C, S] the tokens, -1 where it holds fewer."""
    if not isinstance(selected, Tensor) or selected.is_floating_point():
        raise refuse_lost_selection(indexer, "returns something else than indices or a boolean selection of keys")
    if selected.dtype != torch.bool:
        return selected
    # Whole blocks, and the tokens behind the last whole one.
    most = selects_all_of(indexer) + indexer.compress_ratio - 1 if hasattr(indexer, "compress_ratio") else None
    return marked_keys(selected[:, 0], most).to(torch.int32)
