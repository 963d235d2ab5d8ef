"""Tensors that carry the layout of a sharded batch, or say something about the full one.

- `LayoutMask`: the local padding mask; carries the layout to the mask function.
- `GlobalPositions`: local positions whose maximum is that of the full batch. Rotary embeddings whose frequencies depend
  on the length ("dynamic", "longrope") read the length off the largest position.
- The handle: a tensor of one number that carries the layout into compiled graphs and operators. Another batch is
  another value, not another graph, and the backward gets the handle of its own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..compat import tree_map
from ..errors import UspModelError
from .layout import SequenceLayout

_SAME_MASK = (
    Tensor.to,
    Tensor.bool,
    Tensor.long,
    Tensor.int,
    Tensor.float,
    Tensor.contiguous,
    Tensor.clone,
    Tensor.detach,
    Tensor.view,
    Tensor.reshape,
    Tensor.__getitem__,
    Tensor.eq,
    Tensor.__eq__,
    torch.eq,
)


class LayoutMask(Tensor):
    """This rank's padding mask [B, L] (True: a token) that carries the layout to where masks are made and read.

    Moves, casts and views keep the layout; every other operation returns a plain tensor. `.all()` always returns False:
    models drop all-ones masks, and the layout would be lost on ranks without padding.
    """

    usp_layout: SequenceLayout
    usp_handle: Tensor

    @classmethod
    def of(cls, mask_BL: Tensor, layout: SequenceLayout, handle: Tensor | None = None) -> LayoutMask:
        mask = mask_BL.as_subclass(cls)
        mask.usp_layout, mask.usp_handle = layout, make_handle(layout) if handle is None else handle
        return mask

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func in (torch.all, Tensor.all):
            return torch.zeros_like(result, dtype=torch.bool).as_subclass(Tensor)
        same = isinstance(result, cls) and args and isinstance(args[0], cls) and result.shape == args[0].shape
        if same and func in _SAME_MASK:
            return cls.of(result, args[0].usp_layout, args[0].usp_handle)
        return tree_map(lambda x: x.as_subclass(Tensor) if isinstance(x, cls) else x, result)


class GlobalPositions(Tensor):
    """Positions of this rank's tokens [..., L]; their maximum is the largest of the full batch, `largest` []."""

    largest: Tensor

    @classmethod
    def of(cls, positions: Tensor, largest: Tensor) -> GlobalPositions:
        marked = positions.as_subclass(cls)
        marked.largest = largest
        return marked

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        source = args[0] if args and isinstance(args[0], cls) else None
        if source is not None and func in (torch.max, Tensor.max) and len(args) == 1 and not kwargs:
            return source.largest
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, cls):
            # Views and casts of positions are positions; what is computed from them otherwise is a plain tensor.
            if source is not None and result.dtype in (torch.int64, torch.int32) and result.ndim >= source.ndim:
                result.largest = source.largest
            else:
                result = result.as_subclass(Tensor)
        return result


ATTRIBUTE = "usp_layout"


def make_handle(layout: SequenceLayout) -> Tensor:
    """A handle of this layout: a tensor on the CPU that carries it.

    The layout does not hold its handles: it would then live until Python looks for cycles.
    """
    handle = torch.zeros(1, dtype=torch.int64, device="cpu")
    setattr(handle, ATTRIBUTE, layout)
    return handle


def layout_from_handle(handle: Tensor) -> SequenceLayout:
    """The layout that a handle carries. Copies of a handle carry none: they are refused with a `UspModelError`."""
    layout = getattr(handle, ATTRIBUTE, None)
    if isinstance(layout, SequenceLayout):
        return layout
    raise UspModelError(
        "the layout of the batch was lost, because the tensor that carries it was copied",
        rule="the layout tensor is passed through unmodified; CUDA graphs and hooks on saved tensors copy it",
        remedy="compile without CUDA graphs (no mode='reduce-overhead' or 'max-autotune') and without hooks that copy "
        "saved tensors, or leave out torch.compile",
    )
