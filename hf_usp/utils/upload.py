"""Many small arrays of integers to a device in one copy, for which the host does not wait; and back in one wait.

A copy from pageable memory makes the host wait for the device; a schedule has 4 to 16 arrays. From one page-locked
buffer they travel together, behind what was launched before. Values that the host reads travel together, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

ALIGNED = 16  # bytes: where each array begins, as kernels want it
T = TypeVar("T")


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Tensors on `device` with the values, shapes and dtypes of the arrays; views of one buffer."""
    return _upload([torch.from_numpy(np.ascontiguousarray(array)) for array in arrays], device)


def upload_fields(thing: T, device: torch.device) -> T:
    """The same dataclass with all its CPU tensors on `device`; it looks into dataclasses and tuples inside."""
    found: dict[int, Tensor] = {}
    _collect(thing, found)
    moved = dict(zip(found, _upload(list(found.values()), device), strict=True))
    return _replaced(thing, moved)


def download(tensors: Sequence[Tensor | None]) -> list[np.ndarray | None]:
    """The values of tensors; the host waits once for each device that they are on."""
    found: list[np.ndarray | None] = [None] * len(tensors)
    for device in dict.fromkeys(x.device for x in tensors if x is not None):
        there = {i: x for i, x in enumerate(tensors) if x is not None and x.device == device}
        buffer, places = _side_by_side(list(there.values()), device)
        here = buffer.cpu()
        for (i, x), place in zip(there.items(), places, strict=False):
            found[i] = _part(here, place, x).numpy()
    return found


def _upload(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    buffer, places = _side_by_side(tensors, torch.device("cpu"), pinned=device.type == "cuda")
    there = buffer.to(device, non_blocking=True)
    return [_part(there, place, x) for x, place in zip(tensors, places, strict=False)]


def _side_by_side(tensors: list[Tensor], device: torch.device, pinned: bool = False) -> tuple[Tensor, list[int]]:
    """Copies of the tensors in one buffer of bytes on `device`, and where each begins."""
    places = np.cumsum([0, *(-(-x.nbytes // ALIGNED) * ALIGNED for x in tensors)]).tolist()
    buffer = torch.empty(places[-1], dtype=torch.uint8, device=device, pin_memory=pinned)
    for x, place in zip(tensors, places, strict=False):
        _part(buffer, place, x).copy_(x)
    return buffer, places


def _part(buffer: Tensor, place: int, like: Tensor) -> Tensor:
    return buffer[place : place + like.nbytes].view(like.dtype).view(like.shape)


def _collect(thing: Any, found: dict[int, Tensor]) -> None:
    if isinstance(thing, Tensor):
        found[id(thing)] = thing
    for part in _parts(thing):
        _collect(part, found)


def _parts(thing: Any) -> Sequence[Any]:
    if dataclasses.is_dataclass(thing):
        return [getattr(thing, field.name) for field in dataclasses.fields(thing)]
    # Numbers, of which there are many, hold no tensors.
    return thing if isinstance(thing, tuple) and not (thing and isinstance(thing[0], int)) else ()


def _replaced(thing: Any, moved: dict[int, Tensor]) -> Any:
    if isinstance(thing, Tensor):
        return moved[id(thing)]
    parts = [_replaced(part, moved) for part in _parts(thing)]
    if dataclasses.is_dataclass(thing):
        names = [field.name for field in dataclasses.fields(thing)]
        return dataclasses.replace(thing, **dict(zip(names, parts, strict=True)))  # type: ignore[type-var]
    return tuple(parts) if parts else thing
