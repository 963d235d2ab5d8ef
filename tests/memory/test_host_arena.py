"""Host memory of exact size, used again, given back by whoever lets go last; refused before it is needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import hf_usp
from hf_usp.memory import host_arena
from hf_usp.memory.host_arena import HostArena


@pytest.mark.parametrize("in_a_file", [False, True])
def test_ranges_go_out_and_come_back(in_a_file: bool, tmp_path: Path) -> None:
    arena = HostArena(str(tmp_path) if in_a_file else None)
    for step in range(2):
        arena.reserve([4096, 100, 64])
        assert (arena.size, arena.used) == (4096 + 128 + 64, 0), "exact, and the same every step"
        first = arena.empty((16, 64), torch.float32).fill_(step + 1.0)
        second, third = arena.empty((50,), torch.bfloat16), arena.empty((), torch.float64)
        assert (second.dtype, third.shape, arena.used) == (torch.bfloat16, (), arena.size)
        assert arena.holds(first[3]) and not arena.holds(torch.ones(3))
        row = first[5]
        del first, second
        assert arena.used == 4096 + 64, "a view holds the whole range"
        second = arena.empty((50,), torch.bfloat16).zero_()
        assert row.eq(step + 1).all()
        del row, second, third
        assert arena.used == 0
    assert list(tmp_path.iterdir()) == []


def test_it_grows_beside_ranges_that_are_out_and_is_made_anew_when_none_is() -> None:
    arena = HostArena()
    small = arena.empty((64,), torch.uint8).fill_(7)
    arena.reserve([128, 128])
    assert arena.size == 64 + 256 and arena.used == 64
    arena.reserve([128, 64])
    assert arena.size == 64 + 256, "they fit"
    assert small.eq(7).all()
    del small
    arena.reserve([512])
    assert arena.size == 512


def test_neighbours_that_came_back_are_one() -> None:
    arena = HostArena()
    arena.reserve([64] * 4)
    ranges = [arena.empty((64,), torch.uint8) for _ in range(4)]
    for i in (2, 1):
        ranges.pop(i)
    assert arena.empty((128,), torch.uint8) is not None
    assert arena.size == 256


def test_a_host_without_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_arena, "available_memory", lambda: 4000)
    HostArena().reserve([2000])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(hf_usp.UspConfigError, match=r"2\.11e-06 GB of host memory for each of 2 rank.*4e-06 GB are av"):
        HostArena().reserve([2000, 60])


def test_a_file_system_without_the_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(hf_usp.UspConfigError, match=r"a file of .* GB in .*: No space left on device"):
        HostArena(str(tmp_path)).reserve([64])


def test_memory_of_this_machine() -> None:
    available = host_arena.available_memory()
    assert available is None or 1 << 20 < available < 1 << 50
