"""Inputs of layers that wrappers must leave alone."""

from __future__ import annotations

from typing import TypeVar

Kind = TypeVar("Kind", bound=type)


def passed_on(kind: Kind) -> Kind:
    """A dataclass whose instances travel through wrapped modules as they are.

    FSDP2 with mixed precision copies every dataclass among the inputs of what it wraps, down to the last dict, to cast
    the tensors in it (torch's `_apply_to_tensors`). A layer would count, cache and compare in a copy of its own.
    """
    del kind.__dataclass_fields__  # type: ignore[attr-defined]
    return kind
