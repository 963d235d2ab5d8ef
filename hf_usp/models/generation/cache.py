"""`UspCache`: keys and values of a sharded prompt, each rank those of its own tokens.

The prefill is the sharded forward: a layer's `update` gets the keys of this rank's tokens, with all kv heads, before
they are exchanged, and keeps them. Later tokens are computed by every rank; their keys go to one rank each.

Shape suffixes: B rows, n keys of a row on this rank, G kv heads, D key width, E value width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer

from ...attention.decode import DecodeTile, decode_tiles
from ...batch.layout import MaskSpec, SequenceLayout
from ...distributed.mesh import UspMesh
from ...errors import UspModelError
from ...recurrent.final_states import gather_last_inputs
from ...sharding.intervals import IntArray
from ...sharding.masks import UNLIMITED

SLACK = 128  # a buffer has room for 1/128 more keys, so that a token does not copy it
ATTENTION = (
    "full_attention",
    "sliding_attention",
    "chunked_attention",
)  # types of layers whose cache is one of keys and values
STATES = ("linear_attention", "conv")  # of those that go on from a state
BOTH = ("hybrid", "hybrid_sliding")  # of those that have both
NEITHER = ("mlp", "moe")  # and of those that look at no other token


def not_prepared() -> UspModelError:
    return UspModelError(
        "a UspCache in a model without context parallelism",
        rule="a UspCache is filled by the sharded forward of the model that it was made for",
        remedy="prepare the model (accelerator.prepare_model, hf_usp.apply_context_parallel), or leave the cache out",
    )


class UspLayer(CacheLayerMixin):
    """One layer's keys [B, n, G, D] and values [B, n, G, E] of this rank's tokens, in buffers that grow in steps.

    count: keys that are held. dropped: leading ones that no later token sees. least: the shortest row that they allow.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, cache: UspCache) -> None:
        super().__init__()
        self.cache, self.count, self.dropped, self.least = cache, 0, 0, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep this rank's of the new tokens. Attention gets the new ones in the prefill, later all that are held."""
        mine = self.cache.mine
        if mine is None:
            raise not_prepared()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new_keys, new_values = (x[:, :, mine].transpose(1, 2) for x in (key_states, value_states))
        start, self.count = self.count, self.count + new_keys.shape[1]
        keys = _with_room(self.keys, new_keys, self.count)
        values = _with_room(self.values, new_values, self.count)
        self.keys, self.values = keys, values
        keys[:, start : self.count], values[:, start : self.count] = new_keys, new_values
        self.cache.latest = self
        if self.cache.in_prefill:
            return key_states, value_states
        return keys[:, : self.count].transpose(1, 2), values[:, : self.count].transpose(1, 2)

    def forget(self, mask_spec: MaskSpec) -> None:
        """Drop what lies behind the window of the next query: after the prefill, and when as much again is dead."""
        if mask_spec.window_left == UNLIMITED and not mask_spec.chunk_size:
            return
        cache = self.cache
        next_query = cache.seen - cache.margin
        self.least = next_query
        needed = min(
            int(_first_key(mask_spec, np.array([next_query]), first)[0]) for first in set(cache.first_B.tolist())
        )
        own = cache.positions[self.dropped : self.dropped + self.count]
        dead = int(np.searchsorted(own, needed))
        if dead and (cache.in_prefill or 2 * dead > self.count):
            self._take(lambda x: x[:, dead : self.count].clone())
            self.count, self.dropped = self.count - dead, self.dropped + dead

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens of a whole row: what `generate` and positions count by. It grows after the forward."""
        return self.cache.length

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        self.count = len(self.cache.positions) - self.dropped  # the cache has shortened `positions`

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take(lambda x: x[indices])

    def _take(self, rows: Any) -> None:
        if self.is_initialized:
            self.keys, self.values = rows(self.keys), rows(self.values)


class UspStates(LinearAttentionLayer):
    """A recurrent layer's states, whole ones on every rank: it decodes without a message."""

    is_compileable = False  # beside attention whose keys are sharded

    def __init__(self, cache: UspCache, number_of_states: int) -> None:
        super().__init__(number_of_states=number_of_states)
        self.cache = cache

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Keep the last inputs of each row. The layer gets this rank's tokens in the prefill."""
        layout = self.cache.layout
        if layout is None:
            return super().update_conv_state(conv_states, state_idx, conv_kernel_size=conv_kernel_size, **kwargs)
        if conv_kernel_size is None:
            raise UspModelError(
                "a convolution that does not say how many inputs it keeps",
                rule="the last inputs of a row are gathered from the ranks that hold them",
                remedy="use generate='whole'",
            )
        last = gather_last_inputs(conv_states, conv_kernel_size, layout)
        super().update_conv_state(last, state_idx, conv_kernel_size=conv_kernel_size, **kwargs)
        return conv_states

    def has_states(self) -> bool:
        """Whether the layer has left its states."""
        return all(self.has_previous_state.values())


class UspHybridLayer(UspStates, UspLayer):  # type: ignore[misc, override]
    """A layer with attention and a recurrence side by side."""

    def __init__(self, cache: UspCache, number_of_states: int) -> None:
        UspLayer.__init__(self, cache)
        UspStates.__init__(self, cache, number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of keys and values, which come without names, or of states."""
        (UspLayer if args else UspStates).lazy_initialization(self, *args, **kwargs)

    def reorder_cache(self, beam_idx: Any) -> None:
        UspLayer.reorder_cache(self, beam_idx)
        UspStates.reorder_cache(self, beam_idx)


class UspCache(Cache):
    """The keys and values of a sharded prompt and of the tokens after it. `generate` of a prepared model makes one.

    With `return_dict_in_generate=True` it is in the output, and may be passed to the next `generate`.

    mesh: the ranks. length: tokens of a row before the forward under way, seen: with its own. first_B: the first
    visible token of each row. mine: which of the new tokens this rank keeps. margin: how many of the tokens that were
    seen may be taken back (prompt lookup). latest: the layer that was updated last, until it attends.
    """

    def __init__(self, model: PreTrainedModel, mesh: UspMesh) -> None:
        config = model.config.get_text_config(decoder=True)
        types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        states = getattr(config, "number_of_conv_states", 1)
        made = {**dict.fromkeys(STATES, UspStates), **dict.fromkeys(BOTH, UspHybridLayer)}
        layers = [made[kind](self, states) if kind in made else UspLayer(self) for kind in types]
        super().__init__(layers=list(layers))
        keep = zip(types, layers, strict=True)
        self.usp_layers = [layer for kind, layer in keep if isinstance(layer, UspLayer) and kind not in NEITHER]
        self.layout: SequenceLayout | None = None
        self.mesh, self.length, self.seen, self.in_prefill, self.margin = mesh, 0, 0, False, 0
        self.mine: slice | None = None
        self.kernel: str | None = None
        self.latest: UspLayer | None = None
        self.first_B: IntArray = np.zeros(0, dtype=np.int64)
        self._positions, self._held = np.zeros(0, dtype=np.int64), 0
        self._tiles: dict[Any, list[DecodeTile]] = {}

    @property
    def positions(self) -> IntArray:
        """Positions in a row of the tokens that this rank holds, ascending."""
        return self._positions[: self._held]

    def begin_prefill(self, layout: SequenceLayout, mask_BS: Tensor | None, kept: int) -> None:
        """A sharded forward of full prompts fills the cache.

        Args:
            layout: of the prompts.
            mask_BS: their padding, on the left.
            kept: number of last tokens whose logits are wanted.
        """
        held = layout.row_positions()
        real = int((held < layout.length).sum())  # our padding is last
        self._positions, self._held, self.mine = held[:real], real, slice(0, real)
        self.first_B = np.zeros(layout.batch, dtype=np.int64)
        if mask_BS is not None:
            self.first_B = mask_BS.int().argmax(1).cpu().numpy().astype(np.int64)
        self.seen, self.margin, self.in_prefill = layout.length, kept - 1, True
        self.kernel, self.layout = layout.kernel, layout

    def begin_step(self, count: int, kept: int) -> None:
        """`count` new tokens of each row: blocks of them go round the ranks."""
        mesh = self.mesh
        new = np.arange(count)
        mine = np.flatnonzero((new * mesh.size // count + self.length) % mesh.size == mesh.rank)
        self.mine = slice(int(mine[0]), int(mine[-1]) + 1) if len(mine) else slice(0, 0)
        mine = new[self.mine]
        if self._held + len(mine) > len(self._positions):
            more = np.empty(max(16, len(self._positions) // 8) + len(mine), dtype=np.int64)
            self._positions = np.concatenate((self.positions, more))
        self._positions[self._held : self._held + len(mine)] = mine + self.length
        self._held += len(mine)
        self.seen, self.margin = self.length + count, kept - 1
        self._tiles.clear()

    def finish(self) -> None:
        """The forward is over. Every layer has to have kept its keys."""
        for index, layer in enumerate(self.usp_layers):
            if layer.count + layer.dropped != self._held:
                raise UspModelError(
                    f"layer {index} of {len(self.layers)} kept {layer.count + layer.dropped} of {self._held} keys",
                    rule="every layer keeps keys and values of its own in the cache; layers under activation "
                    "checkpointing do not in training mode, and some models share keys between layers",
                    remedy="call model.eval() before generate; or use generate='whole'",
                )
        if not all(layer.has_states() for layer in self.layers if isinstance(layer, UspStates)):
            raise UspModelError(
                "a recurrent layer that left no state in the cache",
                rule="every recurrent layer goes on from its own state",
                remedy="use generate='whole'",
            )
        self.length, self.in_prefill, self.mine, self.latest = self.seen, False, None, None
        self.layout = None

    def tiles(self, mask_spec: MaskSpec, layer: UspLayer) -> list[DecodeTile]:
        """The tiles of a layer in this step; the same ones for all layers that are alike."""
        key = mask_spec, layer.dropped, layer.count
        if key not in self._tiles:
            own = self.positions[layer.dropped :]
            query = np.arange(self.length, self.seen)
            hi = np.searchsorted(own, query + 1)
            visible = []
            for first in self.first_B.tolist():
                visible.append((np.searchsorted(own, _first_key(mask_spec, query, first)), hi))
            self._tiles[key] = decode_tiles(visible, layer.device)
        return self._tiles[key]

    def forget(self, mask_spec: MaskSpec) -> None:
        """Of the layer that was updated last, drop what no later token sees."""
        if self.latest is not None:
            self.latest.forget(mask_spec)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens; a positive number is the length to keep (until Transformers 5.23)."""
        given = int(tokens_to_remove)  # a tensor, from prompt lookup
        length = given if given > 0 else self.length + given
        least = max(layer.least for layer in self.usp_layers)
        if length < least:
            raise UspModelError(
                f"a cache of {self.length} tokens cut to {length}",
                rule=f"layers with a sliding window have forgotten keys that rows of fewer than {least} tokens need",
                remedy="generate from the prompt again, without the cache",
            )
        self.length = self.seen = length
        self._held = int(np.searchsorted(self.positions, length))
        super().crop(given)

    def reorder_cache(self, beam_idx: Any) -> None:
        if self.first_B.any():
            self.first_B = self.first_B[beam_idx.cpu().numpy()]
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.first_B = self.first_B.repeat(repeats)
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.first_B = self.first_B[indices.cpu().numpy()]
        super().batch_select_indices(indices)

    def reset(self) -> None:
        raise UspModelError(
            "reset() of a UspCache",
            rule="a UspCache serves one batch of prompts",
            remedy="leave the cache out; generate makes a new one",
        )


def _first_key(mask_spec: MaskSpec, queries: IntArray, first: int) -> IntArray:
    """The first position that each query of a row sees, whose first visible token stands at `first`."""
    found = np.full_like(queries, first)
    if mask_spec.window_left != UNLIMITED:
        found = np.maximum(found, queries - mask_spec.window_left)
    if mask_spec.chunk_size:
        found = first + (queries - first) // mask_spec.chunk_size * mask_spec.chunk_size
    return found


def _with_room(buffer: Tensor | None, new: Tensor, count: int) -> Tensor:
    """A buffer [B, at least `count`, G, D] that begins with this one; a copy where it is too short."""
    if buffer is not None and buffer.shape[1] >= count:
        return buffer
    larger = new.new_empty(new.shape[0], count + max(1, count // SLACK), *new.shape[2:])
    if buffer is not None:
        larger[:, : buffer.shape[1]] = buffer
    return larger
