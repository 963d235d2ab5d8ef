"""What a user sets that can be checked by itself: options of a `UspParallelismConfig`, files for results."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .costs.machines import check_machine
from .errors import UspConfigError
from .integers.dealing import ALL_ORDERS
from .integers.degrees import check_degrees
from .integers.whole import DIGITS, check_whole


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


def check_options(
    cp_size: int, ulysses_degree: int | None, sequence_order: str, kernel: str | None, kernels: Collection[str]
) -> None:
    """Raise `UspConfigError` for degrees that do not fit, and for orders and kernels that are not there."""
    check_whole(cp_size=cp_size, ulysses_degree=ulysses_degree)
    if ulysses_degree is not None:
        check_degrees(cp_size, ulysses_degree)
    if sequence_order not in ("auto", *ALL_ORDERS):
        raise UspConfigError(
            f"sequence_order={sequence_order!r}",
            rule=f"it is one of auto, {', '.join(ALL_ORDERS)}",
            remedy="use 'auto'",
        )
    if kernel is not None and kernel not in list(kernels):
        raise UspConfigError(
            f"kernel={kernel!r}",
            rule=f"a kernel is one of {', '.join(kernels)}, or None",
            remedy="leave it out to let hf_usp choose",
        )


def check_chunks(loss_chunk: int | None, mlp_chunk: int | None, gather_outputs: bool) -> None:
    """Raise `UspConfigError` for chunks of no tokens, and for logits that are both left out and to be gathered."""
    check_whole(loss_chunk=loss_chunk, mlp_chunk=mlp_chunk)
    if loss_chunk is not None and gather_outputs:
        raise UspConfigError(
            f"loss_chunk={loss_chunk} with gather_outputs=True",
            rule="a loss in chunks leaves no logits to be gathered",
            remedy="choose one: loss_chunk for training, gather_outputs for predict and compute_metrics",
        )


def check_choice(ranks_per_node: int | None, machine: str | None, sequence_length: int | None) -> None:
    """Raise `UspConfigError` for what no ulysses degree can be chosen from. Files are looked at when they are read."""
    check_whole(ranks_per_node=ranks_per_node, sequence_length=sequence_length)
    if machine is not None and not (isinstance(machine, str) and machine.endswith(".json")):
        check_machine(machine)
