"""Rotary embeddings whose frequencies depend on the length of the sequence ("dynamic", "longrope").

Transformers reads that length off the largest position it is handed, which on a shard is the largest *local* one. In a
sharded forward the positions know the largest of the whole batch; it is appended before such a module looks at them and
its column is dropped from what the module returns, so every rank computes with the frequencies of one process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LENGTH_DEPENDENT = ("dynamic", "longrope")


class GlobalPositions(Tensor):
    """Positions of this rank's tokens [..., L] that know the largest position of the whole batch (`largest` [])."""

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
        result = super().__torch_function__(func, types, args, kwargs or {})
        source = args[0] if args and isinstance(args[0], cls) else None
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


def use_global_length(rope: nn.Module) -> tuple[Any, Any]:
    """Make a rotary embedding see the largest position of the batch; returns the handles of the two hooks."""
    return (
        rope.register_forward_pre_hook(_append, with_kwargs=True),
        rope.register_forward_hook(_drop, with_kwargs=True),
    )


def _append(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
    if not isinstance(positions, GlobalPositions):
        return args, kwargs
    plain, largest = positions.as_subclass(Tensor), positions.largest
    longer = torch.cat([plain, largest.to(plain).expand(*plain.shape[:-1], 1)], dim=-1)
    longer.usp_appended = True  # type: ignore[attr-defined]
    return args[:1], {
        **kwargs,
        **dict(zip(("position_ids", "layer_type"), args[1:], strict=False)),
        "position_ids": longer,
    }


def _drop(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    if not getattr(kwargs.get("position_ids"), "usp_appended", False):
        return output
    return tuple(x[..., :-1, :] for x in output)
