"""Checks of what a user passes, before anything is computed: integers, switches, environment variables, files."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..errors import UspConfigError

DIGITS = 30


def check_positive_int(*, least: int = 1, most: int | None = None, required: bool = False, **values: Any) -> None:
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
            remedy=f"pass {name}={int(value)}, without quotes"
            if quoted
            else f"give {name} a whole number {span}" + ("" if required else ", or leave it out"),
        )


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


def size_from_environment(
    name: str, environment: Mapping[str, str], default: int = 1, *, least: int = 0, most: int | None = None
) -> int:
    """The number that this variable of the environment gives, or the default; `UspConfigError` for other text."""
    text = environment.get(name, str(default))
    whole = text.strip().isdecimal() and len(text) < DIGITS
    if not (whole and least <= int(text) and (most is None or int(text) <= most)):
        raise UspConfigError(
            f"{name}={text!r:.100} in the environment",
            rule="it is a whole number " + ("of at least 1" if most is None else f"from {least} to {most:,}"),
            remedy=f"unset {name}, or export {name}={default or least or 1}, say",
        )
    return int(text)


def check_switches(**values: Any) -> None:
    """Raise `UspConfigError` for what is neither True nor False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise UspConfigError(f"{name}={value!r}", rule="it is True or False", remedy=f"pass {name} as a bool")


def check_writable(path: str) -> None:
    """Refuse a result file that cannot be written, before anything is computed."""
    try:
        with open(path, "a", encoding="utf-8"):
            pass
    except (OSError, ValueError) as problem:
        raise UspConfigError(
            f"a result file {path!r}: {getattr(problem, 'strerror', problem)}",
            rule="the file can be written",
            remedy="create its folder, or name another file",
        ) from problem


def check_folder(path: str, option: str) -> None:
    """Refuse a folder for results that cannot be made or written into, before anything is computed."""
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, ValueError) as problem:
        raise UspConfigError(
            f"{option} {path!r}: {problem}",
            rule="it is a folder that can be made and written into",
            remedy=f"name another folder with {option}, or make room and give yourself the right to write there",
        ) from problem


@contextmanager
def writing(what: str, path: str, option: str) -> Iterator[None]:
    """Make an `OSError` of the block, which saves `what` in a file that `option` names, a `UspConfigError`."""
    try:
        yield
    except OSError as problem:
        raise UspConfigError(
            f"{what} to be saved as {path!r}: {problem}",
            rule="the file can be written",
            remedy=f"make room on the disk and the file writable, or name another with {option}",
        ) from problem
