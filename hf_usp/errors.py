"""Every refusal of hf_usp: what was found, the rule it breaks, and what to do instead.

All are `ValueError`s, raised before anything is computed. `found` names the value and the place, `rule` the
constraint, `remedy` the way out: what to type or to change.
"""

from __future__ import annotations

import unicodedata
from typing import Any


class UspError(ValueError):
    """Base of every refusal. `str(error)` reads: ``usp: <found>. Rule: <rule>. Remedy: <remedy>.``"""

    def __init__(self, found: str, *, rule: str, remedy: str) -> None:
        assert found and rule and remedy, "a refusal says what, where, the rule and the remedy"
        self.found, self.rule, self.remedy = (printable(part).removesuffix(".") for part in (found, rule, remedy))
        super().__init__(f"usp: {self.found}. Rule: {self.rule}. Remedy: {self.remedy}.")

    def __reduce__(self) -> tuple[Any, ...]:
        """Exceptions are pickled by the arguments of their constructor, which must be given by name here."""
        return _again, (type(self), self.found, self.rule, self.remedy), self.__dict__


def _again(kind: type[UspError], found: str, rule: str, remedy: str) -> UspError:
    return kind(found, rule=rule, remedy=remedy)


def printable(text: str) -> str:
    """The text with control characters, which a terminal would obey, and what is no text, as escapes."""
    kept = "\n\t"
    return "".join(
        c if c in kept or unicodedata.category(c)[0] != "C" else c.encode("unicode_escape").decode() for c in text
    )


class UspConfigError(UspError):
    """Degrees, sizes and options that do not fit each other, the world, or the installed versions."""


class UspBatchError(UspError):
    """A batch that cannot be sharded exactly, or that differs between the ranks of one context-parallel group."""


class UspMaskError(UspError):
    """An attention mask that is not one interval of keys per query."""


class UspModelError(UspError):
    """A model, or an argument of its attention, that cannot be sharded exactly."""


class UspKernelError(UspError):
    """A kernel that is unknown, not installed, or unable to compute what was asked."""


class UspRankError(UspError):
    """Another rank failed while this one waited for it; the message has its cause."""
