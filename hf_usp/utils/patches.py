"""Attributes of other libraries' objects that hf_usp replaces, and how they are put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_MISSING = object()


class AttributePatches:
    """A record of replaced attributes; `undo` restores them in reverse order."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def set(self, target: Any, name: str, value: Any) -> None:
        """Set an instance attribute, past the checks of the class (a DataLoader refuses some assignments)."""
        before = vars(target).get(name, _MISSING)
        vars(target)[name] = value

        def restore() -> None:
            if vars(target).get(name) is not value:
                return  # somebody else has replaced it since
            if before is _MISSING:
                del vars(target)[name]
            else:
                vars(target)[name] = before

        self._undo.append(restore)

    def replace_all(self, target: Any, change: Callable[[], None]) -> None:
        """Run `change`, which may set any attribute of `target`."""
        before = dict(vars(target))
        change()

        def restore() -> None:
            vars(target).clear()
            vars(target).update(before)

        self._undo.append(restore)

    def undo(self) -> None:
        """Restore every attribute that still has the value that was set here."""
        while self._undo:
            self._undo.pop()()
