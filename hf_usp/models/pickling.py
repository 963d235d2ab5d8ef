"""`torch.save(model)` leaves our hooks out. The loaded model is an ordinary one."""

from __future__ import annotations

from typing import Any


class NotSaved:
    """Base of objects whose methods are hooks of a model: process groups, and what belongs to a run, stay behind.

    Pickle keeps a hook as the name of a method of its object. Loaded, that is a hook that does nothing.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _Left, ()

    def __deepcopy__(self, memo: dict) -> Any:
        """A copied model shares its hooks' object."""
        return self


class _Left:
    """Stands for a `NotSaved` in a loaded model while that is put together."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return leave_alone


def leave_alone(*args: Any) -> None:
    """A hook that changes nothing."""
