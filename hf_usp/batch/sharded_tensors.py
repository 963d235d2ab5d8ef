"""Objects that carry the `ForwardContext` to layers, and tensors that say something about the full batch.

One object carries the context: the handle, a tensor of one number with the context as an attribute. It goes through
compiled graphs and operators: another batch is another value, not another graph, and the backward gets the handle of
its own forward. The tensors that a model hands to its layers hold the handle:

- `ContextMask`: the local padding mask, which the model hands to its mask function.
- `ShardedMask`: the result of the mask function, which the model hands to every layer.

Beside them the keyword `usp` is the context itself, or in a hand-written loop its layout. `context_of` reads them all.

`GlobalPositions` are local positions whose maximum is that of the full batch. Rotary embeddings whose frequencies
depend on the length ("dynamic", "longrope") read the length off the largest position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compat import tree_map
from ..errors import UspMaskError, UspModelError
from ..utils.tensors import opaque_to_fsdp
from .context import ForwardContext
from .layout import MaskSpec, SequenceLayout

ATTRIBUTE = "usp_context"


def make_handle(context: ForwardContext) -> Tensor:
    """A handle of this context: a tensor on the CPU that carries it.

    The context does not hold its handles: it would then live until Python looks for cycles.
    """
    handle = torch.zeros(1, dtype=torch.int64, device="cpu")
    setattr(handle, ATTRIBUTE, context)
    return handle


def context_of(*values: object) -> ForwardContext | None:
    """The context that the first of these values carries that carries one; None without any.

    Values: the arguments of a model or layer, masks of several kinds in a dict among them. A layout carries no context.
    Where nothing else does, it is that of a hand-written loop, and gets a new one.
    """
    layout = None
    for value in [x for given in values for x in (given.values() if isinstance(given, dict) else (given,))]:
        if isinstance(value, ForwardContext):
            return value
        if isinstance(value, SequenceLayout):
            layout = value
        carrier = value.handle if isinstance(value, ContextMask | ShardedMask) else value
        if isinstance(carrier, Tensor) and hasattr(carrier, ATTRIBUTE):
            context: ForwardContext = getattr(carrier, ATTRIBUTE)
            return context
    return None if layout is None else ForwardContext(layout, manual_loop=True)


def context_from_handle(handle: Tensor) -> ForwardContext:
    """The context of a handle. Copies of a handle carry none: they are refused with a `UspModelError`."""
    context = context_of(handle)
    if context is not None:
        return context
    raise UspModelError(
        "the layout of the batch was lost, because the tensor that carries it was copied",
        rule="the layout tensor is passed through unmodified; CUDA graphs and hooks on saved tensors copy it",
        remedy="compile without CUDA graphs (no mode='reduce-overhead' or 'max-autotune') and without hooks that copy "
        "saved tensors, or leave out torch.compile",
    )


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


class ContextMask(Tensor):
    """This rank's padding mask [B, L] (True: a token) that carries the context to where masks are made and read.

    Moves, casts and views keep the context; every other operation returns a plain tensor. `.all()` always returns
    False: models drop all-ones masks, and the context would be lost on ranks without padding.
    """

    handle: Tensor

    @classmethod
    def of(cls, mask_BL: Tensor, handle: Tensor) -> ContextMask:
        mask = mask_BL.as_subclass(cls)
        mask.handle = handle
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
            return cls.of(result, args[0].handle)
        return tree_map(lambda x: x.as_subclass(Tensor) if isinstance(x, cls) else x, result)


class _MaskTouchedError(UspMaskError, AttributeError):
    """A model computes with the mask itself; also an AttributeError, so that `hasattr` stays a question."""


@opaque_to_fsdp
@dataclass(frozen=True, eq=False)
class ShardedMask:
    """The attention mask that a layer of a sharded forward gets.

    Attributes:
        handle: of the context of the forward (`make_handle`).
        mask_spec: the mask.
    """

    handle: Tensor
    mask_spec: MaskSpec

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


def _takes_all(index: Any) -> bool:
    """Whether an index of one dim (or the dots for several) leaves it whole."""
    return index is Ellipsis or (isinstance(index, slice) and index in (slice(None), slice(0, None)))


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
