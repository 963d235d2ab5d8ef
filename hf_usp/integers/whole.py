"""Sizes are whole numbers: the one place that refuses others."""

from __future__ import annotations

from typing import Any

from ..errors import UspConfigError


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
        quoted = isinstance(value, str) and value.strip().isdecimal()
        raise UspConfigError(
            f"{name}={value!r}",
            rule=f"{name} is a whole number {span}",
            remedy=f"pass {name}={int(value)}, without quotes" if quoted
            else f"give {name} a whole number {span}" + ("" if required else ", or leave it out"),
        )  # fmt: skip
