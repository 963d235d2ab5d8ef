"""The mask function of attn_implementation="usp": Transformers' mask functions read as integers.

Inside a sharded forward a mask is a `ShardedMask`: the context of the forward and the kind of mask. The model passes
it to every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, eager_mask, sdpa_mask

from ..batch.layout import MaskSpec
from ..batch.sharded_tensors import ContextMask, ShardedMask
from ..compat import chunks_from_row_start, mask_parts
from ..errors import UspMaskError
from ..sharding.masks import UNLIMITED

CHUNKS_BY_ROW = chunks_from_row_start()


def usp_mask(
    *,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """The mask function of "usp": a `ShardedMask` inside a sharded forward, else the mask that sdpa gets."""
    if isinstance(attention_mask, ContextMask):
        return _sharded_mask(mask_function, attention_mask)
    if hasattr(kwargs.get("config"), "compress_rates"):
        # DeepSeek-V4 appends what is added to scores; as a boolean that would be its opposite.
        return eager_mask(mask_function=mask_function, attention_mask=attention_mask, **kwargs)
    # The mask is made for sdpa; layers with a softcap or sinks need a mask too where sdpa would do with is_causal.
    return sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, **kwargs)


@torch.compiler.disable
def _sharded_mask(mask_function: Callable[..., Any], mask: ContextMask) -> ShardedMask:
    """Outside of graphs: dynamo does not read closures. Made once a forward and mask_spec, before the layers."""
    return ShardedMask(mask.handle, read_mask_function(mask_function))


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
