"""Sizes are whole numbers, rates are finite ones: the one place that refuses others."""

from __future__ import annotations

import math
from typing import Any

from ..errors import UspConfigError

DIGITS = 30


def check_whole(*, least: int = 1, most: int | None = None, required: bool = False, **values: Any) -> None:
    """Raise `UspConfigError` for what is no whole number from `least` to `most`; None passes if not `required`.

    True is no number, and neither is "2".
    """
    for name, value in values.items():
        if value is None and not required:
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        if whole and least <= value and (most is None or value <= most):
            continue
        span = f"of at least {least}" if most is None else f"from {least} to {most:,}"
        quoted = isinstance(value, str) and value.strip().isdecimal() and len(value) < DIGITS
        raise UspConfigError(
            f"{name}={value!r:.100}",
            rule=f"{name} is a whole number {span}",
            remedy=f"pass {name}={int(value)}, without quotes" if quoted
            else f"give {name} a whole number {span}" + ("" if required else ", or leave it out"),
        )  # fmt: skip


def check_number(*, least: float = 0.0, most: float = 1e30, **values: Any) -> None:
    """Raise `UspConfigError` for what is no number above `least` (or `least` itself, unless that is 0) up to `most`."""
    for name, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if number and least <= value <= most and value > 0:
            continue
        span = f"from {least:,g}" if least > 0 else "above 0"
        raise UspConfigError(
            f"{name}={value!r:.100}",
            rule=f"{name} is a number {span} up to {most:,g}",
            remedy=f"give {name} such a number",
        )
