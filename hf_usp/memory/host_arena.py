"""Host memory for what leaves the device: few regions of exact size, whose ranges are used again every step.

torch's allocator of page-locked memory rounds each buffer up to a power of two: 5 GiB become 8. Here a region is as
large as what a forward will put there. A range goes back when the last tensor in it is gone, whoever held it: a
backward, a step that failed, a forward without a backward.

With a folder, a region is a file there. It has no name, so nothing is left of it after the run.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections import deque
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from ..errors import UspConfigError
from ..utils.validation import size_from_environment

ALIGNMENT = 64  # bytes
MEMINFO = "/proc/meminfo"  # of Linux


class HostArena:
    """Ranges of host memory.

    Attributes:
        folder: of the files behind the regions; None: memory alone.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self._regions: list[_Region] = []

    @property
    def size(self) -> int:
        """Bytes of all regions."""
        return sum(region.size for region in self._regions)

    @property
    def used(self) -> int:
        """Bytes of all ranges that are out."""
        return self.size - sum(b - a for region in self._regions for a, b in region.spans())

    def reserve(self, sizes: Sequence[int]) -> None:
        """Make room for tensors of so many bytes each, beside those that are there. Memory is not touched yet.

        Raises:
            UspConfigError: host memory or the file system lacks the room.
        """
        missing = self._missing(sizes)
        if missing and not self.used:  # one region of exact size, instead of those that are too small
            while self._regions:
                self._regions.pop().close()
            missing = self._missing(sizes)
        if missing:
            self._regions.append(_Region(missing, self.folder))

    def lock(self) -> None:
        """Page-lock all regions for copies of CUDA devices, but files, whose pages have to leave memory."""
        if self.folder is None:
            for region in self._regions:
                region.lock()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor in a range of its own; raises as `reserve`."""
        size = prod(shape) * dtype.itemsize
        self.reserve([size])
        found = (region.take(_rounded(size)) for region in self._regions)
        array = next(array for array in found if array is not None)
        return torch.from_numpy(array)[:size].view(dtype).view(tuple(shape))

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is in a range of this arena."""
        place = tensor.data_ptr()
        return any(region.address <= place < region.address + region.size for region in self._regions)

    def _missing(self, sizes: Sequence[int]) -> int:
        """Bytes of those that fit into no free span, taken in order, each the first span that has room."""
        spans = [[a, b] for region in self._regions for a, b in region.spans()]
        missing = 0
        for size in map(_rounded, sizes):
            span = next((span for span in spans if span[1] - span[0] >= size), None)
            if span is None:
                missing += size
            else:
                span[0] += size
        return missing


class _Region:
    """Memory at one address."""

    def __init__(self, size: int, folder: str | None) -> None:
        self.size, self.locked = size, False
        self.memory = _mapped(size) if folder is None else _file(size, folder)
        self.address: int = np.frombuffer(self.memory, dtype=np.uint8).ctypes.data
        self.free = [(0, size)]
        self.returned: deque[tuple[int, int]] = deque()  # by whatever thread lets go of a tensor, at any moment

    def spans(self) -> list[tuple[int, int]]:
        """The free ranges (start, end), in order, none next to another."""
        while self.returned:
            self.free.append(self.returned.popleft())
        merged: list[tuple[int, int]] = []
        for start, end in sorted(self.free):
            if merged and merged[-1][1] == start:
                start = merged.pop()[0]
            merged.append((start, end))
        self.free = merged
        return merged

    def take(self, size: int) -> np.ndarray | None:
        """A range, which returns when the array and all tensors over it are gone; None where none is large enough."""
        for i, (start, end) in enumerate(self.spans()):
            if end - start >= size:
                self.free[i : i + 1] = [(start + size, end)] if end - start > size else []
                array = np.frombuffer(self.memory, dtype=np.uint8, count=size, offset=start)
                weakref.finalize(array, self.returned.append, (start, start + size)).atexit = False
                return array
        return None

    def lock(self) -> None:
        if not self.locked:
            runtime = torch.cuda.cudart()
            torch.cuda.check_error(int(runtime.cudaHostRegister(self.address, self.size, 0)))
            self.locked = True

    def close(self) -> None:
        """Unlock the memory, once no copy is under way; it goes with the last reference."""
        if self.locked:
            torch.cuda.synchronize()
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(self.address)))


def _rounded(size: int) -> int:
    """Tensors begin where every dtype may."""
    return max(-(-size // ALIGNMENT), 1) * ALIGNMENT


def _mapped(size: int) -> mmap.mmap:
    ranks = size_from_environment("LOCAL_WORLD_SIZE", os.environ, 1, least=1)
    available = available_memory()
    if available is not None and size * ranks > available:
        raise UspConfigError(
            f"{size / 1e9:,.3g} GB of host memory for each of {ranks} rank(s) of a machine, "
            f"of which {available / 1e9:,.3g} GB are available",
            rule="what is kept in host memory until the backward has room there",
            remedy="let offload_checkpoints name a folder for a file, keep_attention fewer layers, or share sequences "
            "by a larger cp_size",
        )
    return mmap.mmap(-1, size)


def _file(size: int, folder: str) -> mmap.mmap:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)
            return mmap.mmap(file.fileno(), size)
    except OSError as problem:
        raise UspConfigError(
            f"a file of {size / 1e9:,.3g} GB in {folder!r}: {problem.strerror}",
            rule="what is kept until the backward has room in the file behind it",
            remedy="make room there, or let offload_checkpoints name another folder",
        ) from problem


def available_memory(path: str = MEMINFO) -> int | None:
    """Bytes of host memory that can be had without swapping; None where the system does not say."""
    try:
        with open(path, encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None
