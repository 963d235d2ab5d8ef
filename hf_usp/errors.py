"""Every refusal of hf_usp: what was found, the rule it breaks, and what to do instead.

All are `ValueError`s, raised before anything is computed. `found` names the value and the place, `rule` the
constraint, `remedy` the way out.
"""

from __future__ import annotations


class UspError(ValueError):
    """Base of every refusal. `str(error)` reads: ``usp: <found>. Rule: <rule>. Remedy: <remedy>.``"""

    def __init__(self, found: str, *, rule: str = "", remedy: str = "") -> None:
        text = found if found.startswith("usp: ") else f"usp: {found}"
        for label, part in (("Rule", rule), ("Remedy", remedy)):
            if part:
                text = f"{text.rstrip('.')}. {label}: {part.rstrip('.')}."
        super().__init__(text)


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
