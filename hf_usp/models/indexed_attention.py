"""Attention to the keys that an indexer selects (DSA, QSA, block-sparse): its mask, and its part of the "usp" function.

Models write a selection in one of three ways: token indices beside the mask (`indices`), block indices beside it
(`block_indices`), or a mask that is combined with the selection (`mask & selected`). An `IndexedMask` records the last.

Shape suffixes: B rows, L tokens of a row on this rank, S tokens of a row, C queries of a chunk, H query heads, G kv
heads, D key width, E value width, R width of a latent, N width without a position, K selected keys or blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.selected import Selection, attend_to_selected
from ..batch.context import ForwardContext, SelectionShape
from ..batch.documents import is_left_padded
from ..batch.layout import MaskSpec, SequenceLayout
from ..batch.sharded_tensors import ShardedMask
from ..errors import UspMaskError, UspModelError
from ..utils.dtypes import as_autocast
from ..utils.tensors import opaque_to_fsdp


@opaque_to_fsdp
@dataclass(frozen=True, eq=False)
class IndexedMask(ShardedMask):
    """The mask of a layer that selects keys. It records what the layer does to it.

    Attributes:
        handle: of the context of the forward.
        mask_spec: the mask.
        selecting: whether a query of this batch sees more keys than it may select. Else attention is the usual one.
        latents: whether keys are latents: [latent, rotary part], the values are the latents.
        cuts: indices that the layer has applied, such as [:, 0].
        selected: token indices [B, L, K] that the layer has combined with the mask.
    """

    handle: Tensor
    mask_spec: MaskSpec
    selecting: bool = False
    latents: bool = False
    cuts: tuple[Any, ...] = ()
    selected: Tensor | None = None
    dtype = torch.bool  # models ask how to combine it with a selection

    def __getitem__(self, index: Any) -> IndexedMask:
        return IndexedMask(
            self.handle, self.mask_spec, self.selecting, self.latents, (*self.cuts, index), self.selected
        )

    def __and__(self, selected: Any) -> IndexedMask:
        if self.selected is not None or not isinstance(selected, Tensor) or selected.is_floating_point():
            self._touched(selected)
        return IndexedMask(self.handle, self.mask_spec, self.selecting, self.latents, self.cuts, selected)

    def dense(self, layout: SequenceLayout, start: int, stop: int, device: torch.device) -> Tensor:
        """Which keys of their row the local queries start .. stop - 1 see [B, 1, C, S], with the cuts applied."""
        first, last = seen_intervals(layout, self.mask_spec, device)
        keys = torch.arange(layout.length, device=device)
        seen = (keys >= first[:, start:stop, None]) & (keys < last[:, start:stop, None])
        seen = seen[:, None]
        for cut in self.cuts:
            seen = seen[cut]
        return seen


def seen_intervals(layout: SequenceLayout, mask_spec: MaskSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """The keys first .. last - 1 of its row that each local query sees, [B, L] both; made once."""

    def make() -> tuple[Tensor, Tensor]:
        held = layout.positions_per_rank()[layout.mesh.rank]
        first, last = (
            torch.from_numpy(edge.reshape(layout.batch, -1)).to(device)
            for edge in layout.mask(mask_spec).interval(held)
        )
        start = torch.arange(layout.batch, device=device)[:, None] * layout.padded
        return first - start, last - start

    return layout.memoize(("seen_intervals", mask_spec, device), make)


def attend_indexed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: IndexedMask,
    context: ForwardContext,
    index: Tensor,
    sinks: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention over selected keys: query [B, H, L, D], key and value of all tokens [B, G, S, ...] -> [B, L, H, E].

    index: selected tokens of a row [B, 1 or G, L, K], -1 for none.
    """
    first, last = seen_intervals(context.layout, mask.mask_spec, query.device)
    selection = Selection(index, first, last)
    query, key, value = as_autocast(query, key, value)
    weights_HRE = None
    if mask.latents:
        query, weights_HRE = absorb_expansion(module, query)
        query, key = as_autocast(query, key)
    shape = SelectionShape(
        query.shape[1], key.shape[1], key.shape[-1], value.shape[-1], index.shape[-1], mask.latents, query.dtype
    )
    context.selections[shape] += 1
    values = value.shape[-1] if mask.latents else value
    out_BHLE = attend_to_selected(query, key, values, sinks, selection, scale)
    if weights_HRE is not None:
        return torch.einsum("bhlr,hre->blhe", out_BHLE, weights_HRE.to(out_BHLE.dtype)).contiguous()
    return out_BHLE.transpose(1, 2).contiguous()


def absorb_expansion(module: Any, query_BHLD: Tensor) -> tuple[Tensor, Tensor]:
    """Queries that score latents [B, H, L, R + rotary], and the weights that expand outputs of latents [H, R, E].

    The module that expands latents is asked for its matrix instead of read, so that LoRA and quantized weights count.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.2 (matrices absorbed).
    """
    width = module.qk_nope_head_dim
    eye_RR = torch.eye(module.kv_lora_rank, dtype=query_BHLD.dtype, device=query_BHLD.device)
    both_RHX = module.kv_b_proj(eye_RR).unflatten(-1, (-1, width + module.v_head_dim))
    keys_RHN, values_RHE = both_RHX.split([width, module.v_head_dim], dim=-1)
    unrotated, rotated = query_BHLD[..., :width], query_BHLD[..., width:]
    scoring = torch.einsum("bhln,rhn->bhlr", unrotated, keys_RHN.to(unrotated.dtype))
    return torch.cat([scoring, rotated], dim=-1), values_RHE.transpose(0, 1)


def selected_index(
    module: Any, mask: Any, indices: Tensor | None, block_indices: Tensor | None, length: int
) -> Tensor | None:
    """The selection of a layer, as tokens of a row [B, 1 or G, L, K]; None where it has selected nothing.

    mask: the layer's mask. indices [B, L, K], block_indices [B, G, L, K]: keywords of its attention call. length: S.
    """
    if block_indices is not None:
        if block_indices.shape[-1] == 0:
            return None
        size = getattr(getattr(module, "indexer", None), "block_size", None)
        if size is None:
            raise refuse_lost_selection(module, "selects blocks of keys, and hf_usp does not see how large")
        tokens = block_indices.long()[..., None] * size + torch.arange(size, device=block_indices.device)
        return tokens.masked_fill((block_indices < 0)[..., None] | (tokens >= length), -1).flatten(-2)
    if isinstance(mask, IndexedMask) and mask.selected is not None:
        indices = mask.selected
    return None if indices is None or indices.shape[-1] == 0 else indices[:, None]


def with_selection(attention_mask: Tensor | None, index: Tensor, heads: int, length: int) -> Tensor:
    """The boolean mask [B, 1 or H, L, S] of one process, in which a query sees what it has selected besides.

    attention_mask: boolean, broadcastable to [B, 1, L, S]; None: causal. index: tokens [B, 1 or G, L, K].
    """
    index = index.long()
    chosen = torch.zeros(*index.shape[:3], length + 1, dtype=torch.bool, device=index.device)
    chosen = chosen.scatter(-1, index.masked_fill(index < 0, length), True)[..., :length]
    if chosen.shape[1] > 1:
        chosen = chosen.repeat_interleave(heads // chosen.shape[1], dim=1)
    if attention_mask is None:
        attention_mask = torch.ones(index.shape[2], length, dtype=torch.bool, device=index.device)
        attention_mask = attention_mask.tril(length - index.shape[2])
    return attention_mask & chosen


def refuse_lost_selection(module: nn.Module, found: str) -> UspModelError | UspMaskError:
    """The refusal of a layer whose selection cannot be followed."""
    return UspModelError(
        f"{type(module).__name__} {found}",
        rule="a query attends to the keys that its layer has selected, and to no others",
        remedy="this model cannot be sharded exactly; train it without UspParallelismConfig",
    )


def refuse_other_rows(module: nn.Module, batch: Mapping[str, Any]) -> None:
    """Refuse documents and left padding for a module that is told of neither: it counts keys from the row's start."""
    positions, mask, seq_lens = (batch.get(name) for name in ("position_ids", "attention_mask", "cu_seq_lens_q"))
    padded = is_left_padded(mask)
    packed = seq_lens is not None or (positions is not None and bool((positions.diff(dim=-1) != 1).any()))
    if padded or packed:
        raise UspModelError(
            f"{'left padding' if padded else 'packed documents'} for {type(module).__name__}, which takes keys by "
            "their place in the row",
            rule="a sharded run equals one process, where pads and other documents are among the keys of such a query",
            remedy="pad on the right, and do not pack",
        )
