"""The mask function of attn_implementation="usp": Transformers' mask functions read as integers.

Inside a sharded forward a mask is a `ShardedMask`: the layout of the batch and the kind of mask. The model passes it to
every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from ..batch.layout import MaskSpec, SequenceLayout
from ..batch.sharded_tensors import LayoutMask
from ..compat import chunks_from_row_start, mask_parts
from ..errors import UspMaskError
from ..sharding.masks import UNLIMITED
from ..utils.tensors import opaque_to_fsdp

CHUNKS_BY_ROW = chunks_from_row_start()


class _MaskTouchedError(UspMaskError, AttributeError):
    """A model computes with the mask itself; also an AttributeError, so that `hasattr` stays a question."""


@opaque_to_fsdp
@dataclass(frozen=True, eq=False)
class ShardedMask:
    """The attention mask that a layer of a sharded forward gets.

    Attributes:
        layout: layout of the batch.
        mask_spec: the mask.
        handle: the layout handle, under torch.compile; else None.
    """

    layout: SequenceLayout
    mask_spec: MaskSpec
    handle: Tensor | None = None

    def __getitem__(self, index: Any) -> ShardedMask:
        # Gemma 4 cuts off nothing from the masks of its last layers in this way.
        if all(_takes_all(part) for part in (index if isinstance(index, tuple) else (index,))):
            return self
        return self._touched(index)

    def _touched(self, other: Any) -> Any:
        self.__getattr__("[...]")

    __add__ = __radd__ = __mul__ = __rmul__ = __and__ = __or__ = __sub__ = __rsub__ = _touched

    def __getattr__(self, name: str) -> Any:
        raise _MaskTouchedError(
            f"the model reads `{name}` of its attention mask during a sharded forward",
            rule="in a sharded forward masks are intervals in integers, not tensors; a model may only pass them on",
            remedy="this model cannot be sharded exactly; train it without UspParallelismConfig",
        )


def layout_in(values: Iterable[Any]) -> SequenceLayout | None:
    """The layout that the first of these values carries that is a layout or a mask with one; None without any."""
    for value in values:
        if isinstance(value, SequenceLayout):
            return value
        if isinstance(value, ShardedMask):
            return value.layout
        if isinstance(value, LayoutMask):
            return value.usp_layout
    return None


def _takes_all(index: Any) -> bool:
    """Whether an index of one dim (or the dots for several) leaves it whole."""
    return index is Ellipsis or (isinstance(index, slice) and index in (slice(None), slice(0, None)))


def usp_mask(
    *,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """The mask function of "usp": a `ShardedMask` inside a sharded forward, else the mask that sdpa gets."""
    if isinstance(attention_mask, LayoutMask):
        return _sharded_mask(mask_function, attention_mask)
    # The mask is made for sdpa; layers with a softcap or sinks need a mask too where sdpa would do with is_causal.
    return sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, **kwargs)


@torch.compiler.disable
def _sharded_mask(mask_function: Callable[..., Any], mask: LayoutMask) -> ShardedMask:
    """Outside of graphs: dynamo does not read closures. Made once a forward and mask_spec, before the layers."""
    return ShardedMask(mask.usp_layout, read_mask_function(mask_function), mask.usp_handle)


def read_mask_function(mask_function: Callable[..., Any]) -> MaskSpec:
    """The kind of mask that a mask function of `transformers.masking_utils` describes, or a `UspMaskError`.

    These functions are closures; the overlay's number is read from its cell. Others are refused.
    """
    if mask_function is causal_mask_function:
        return MaskSpec()
    if mask_function is bidirectional_mask_function:
        return MaskSpec(UNLIMITED, UNLIMITED)
    parts = mask_parts(mask_function)
    if len(parts) == 2:
        overlay, base = parts[0], parts[1].function
        name, numbers = overlay.name.split(".")[0], overlay.values
        if name == "sliding_window_overlay" and base is causal_mask_function:
            return MaskSpec(window_left=numbers["sliding_window"] - 1)
        if name == "chunked_overlay" and base is causal_mask_function:
            return MaskSpec(chunk_size=numbers["chunk_size"], chunks_from_row_start=CHUNKS_BY_ROW)
        if name == "sliding_window_bidirectional_overlay" and base is bidirectional_mask_function:
            return MaskSpec(numbers["sliding_window"], numbers["sliding_window"])
    raise UspMaskError(
        f"a mask made of {', '.join(part.name for part in parts)}",
        rule="a query sees one interval of keys: causal, both ways, sliding window, chunks, documents, padding",
        remedy="train without UspParallelismConfig, or without what changes the mask (image blocks, prefix-LM)",
    )
