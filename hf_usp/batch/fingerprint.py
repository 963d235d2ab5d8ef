"""Checksums over every bit of tensors, cheap enough to be compared over ranks in every step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 21  # words of eight bytes at a time: what is computed between is not as large as the tensor
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # the constants of splitmix64, as torch's int64 takes them
FIRST, SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


def fingerprint(values: Mapping[str, Any], *beside: Any) -> Tensor:
    """Two int64 [2]: of names, shapes and plain values (also those `beside` them), and of every bit of the tensors.

    Tensors inside dicts, lists and tuples count as well, those of other objects do not; whether
    a gradient is wanted counts too. Different values have different
    numbers but for one pair of 2**64; a NaN counts by its bits. The second number is computed where the tensors are.
    """
    shapes: list[Any] = [repr(thing) for thing in beside]
    total = torch.zeros((), dtype=torch.int64)
    for name, value in sorted(_leaves("", values), key=lambda leaf: leaf[0]):
        if isinstance(value, Tensor):
            gradient = value.requires_grad and torch.is_grad_enabled()  # which all ranks would have to exchange
            shapes.append((name, tuple(value.shape), str(value.dtype), gradient))
            total = total.to(value.device) + checksum(words(value), hashed(name))
        else:
            plain = value is None or isinstance(value, int | float | bool | str)
            shapes.append((name, value if plain else type(value).__name__))
    return torch.stack([torch.full_like(total, hashed(repr(shapes))), total])


def checksum(words_N: Tensor, seed: int = 0) -> Tensor:
    """One int64 [] of all words [N] int64 and their places, on their device.

    Each word is mixed with its place before the sum (the finalizer of splitmix64): a linear sum is blind to changes
    that cancel, 5 9 9 5 for 6 8 8 6.
    """
    total = torch.zeros((), dtype=torch.int64, device=words_N.device)
    for start in range(0, len(words_N), CHUNK):
        part = words_N[start : start + CHUNK]
        place = torch.arange(start + 1, start + 1 + len(part), device=part.device)
        mixed = part ^ (place * GOLDEN + seed)
        mixed = (mixed ^ _shifted(mixed, 30)) * FIRST
        mixed = (mixed ^ _shifted(mixed, 27)) * SECOND
        total = total + (mixed ^ _shifted(mixed, 31)).sum()
    return total


def words(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as int64 [N], filled up with zeros; of no more bytes than it has."""
    flat = tensor.detach().as_subclass(Tensor).contiguous().view(-1).view(torch.uint8)
    full = len(flat) // 8 * 8
    if flat.storage_offset() % 8 or flat.data_ptr() % 8:
        flat = flat.clone()
    if full == len(flat):
        return flat.view(torch.int64)
    rest = torch.nn.functional.pad(flat[full:], (0, 8 - len(flat) + full)).view(torch.int64)
    return torch.cat([flat[:full].view(torch.int64), rest])


def hashed(text: str) -> int:
    """A text as a signed number of 64 bits, the same in every process."""
    digest = hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; torch's own fills up with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    inside: Iterable[tuple[Any, Any]]
    if isinstance(value, Mapping):
        inside = value.items()
    elif isinstance(value, list | tuple):
        inside = enumerate(value)
    else:
        yield name, value
        return
    for key, entry in inside:
        yield from _leaves(f"{name}/{key}", entry)
