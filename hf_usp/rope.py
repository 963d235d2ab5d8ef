"""Rotary embeddings whose frequencies depend on the length of the sequence ("dynamic", "longrope").

Transformers reads that length off the largest position it is handed, which on a shard is the largest *local* one. The
positions of a sharded batch therefore answer `max` with the largest of the whole batch, so every rank computes with the
frequencies of one process, in prepared models and in hand-written loops alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LENGTH_DEPENDENT = ("dynamic", "longrope")


class GlobalPositions(Tensor):
    """Positions of this rank's tokens [..., L]; their maximum is the largest of the whole batch, `largest` []."""

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


def length_dependent_ropes(model: nn.Module) -> list[nn.Module]:
    """The rotary embeddings of a model that look at the sequence length."""
    found = []
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kinds = kind.values() if isinstance(kind, dict) else (kind,)
        if any(isinstance(k, str) and any(name in k for name in LENGTH_DEPENDENT) for k in kinds):
            found.append(module)
    return found
