"""Inputs of layers that wrappers must leave alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Kind = TypeVar("Kind", bound=type)


def opaque_to_fsdp(kind: Kind) -> Kind:
    """A dataclass whose instances travel through wrapped modules as they are.

    FSDP2 with mixed precision copies every dataclass among the inputs of what it wraps, down to the last dict, to cast
    the tensors in it (torch's `_apply_to_tensors`). A layer would count, cache and compare in a copy of its own.
    """
    del kind.__dataclass_fields__  # type: ignore[attr-defined]
    return kind


_NARROW = (torch.bfloat16, torch.float16)
_TO_NARROW = (Tensor.bfloat16, Tensor.half)
_MOVES = (Tensor.to, Tensor.cuda, Tensor.cpu, Tensor.clone, Tensor.detach, Tensor.float, Tensor.double)


class TokenCount(Tensor):
    """How many label tokens a loss is divided by, [] in fp32 or wider; casts to bf16 and fp16 leave it as it is.

    Wrappers with mixed precision cast every floating-point input of a model, and 1001.5 tokens would become 1000. Moves
    to a device keep it; whatever is computed from it is a plain tensor.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _TO_NARROW:
            return args[0]
        if func is Tensor.to:
            args = tuple(x for x in args if not _narrow(x))
            kwargs = {name: x for name, x in kwargs.items() if not _narrow(x)}
            if len(args) == 1 and not kwargs:
                return args[0]
        result = super().__torch_function__(func, types, args, kwargs)
        return result.as_subclass(Tensor) if isinstance(result, cls) and func not in _MOVES else result


def _narrow(target: Any) -> bool:
    return isinstance(target, torch.dtype) and target in _NARROW
