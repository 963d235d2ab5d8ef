"""How fast ranks talk: pairs, all-to-alls of every ulysses degree, hops of every ring; and how fast a rank computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...distributed.comm import all_to_all, start_p2p
from ...distributed.mesh import UspMesh
from .issues import Transfer

REPEATS = 5
SMALL = 256


def clock(act: Callable[[], Any], device: torch.device, repeats: int = REPEATS) -> float:
    """Seconds of `act`, the best of some tries after one to warm up."""
    best = float("inf")
    for number in range(repeats + 1):
        start = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number:
            best = min(best, time.perf_counter() - start)
    return best


def pairs(device: torch.device, size: int, nodes: Sequence[Any]) -> list[Transfer]:
    """Ranks that differ in one bit of their number exchange messages, all pairs of one bit at a time.

    Returns what the lower rank of each pair measured.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    assert group is not None
    measured = []
    bit = 1
    while bit < world:
        partner = rank ^ bit
        dist.barrier()
        if partner < world:
            times = []
            for count in (SMALL, size):
                send, receive = (torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(2))
                times.append(
                    clock(lambda s=send, r=receive, p=partner: start_p2p(group, [(s, p)], [(r, p)]).wait(), device)  # type: ignore[misc]
                )
            if rank < partner:
                inside = nodes[rank] == nodes[partner]
                measured.append(Transfer("pair", (rank, partner), inside, times[0], size / times[1]))
        bit *= 2
    return measured


def exchanges(mesh: UspMesh, device: torch.device, size: int, nodes: Sequence[Any]) -> list[Transfer]:
    """All-to-all of the ulysses group and a hop along the ring of one mesh, told by the first rank of each group."""
    measured = []
    group, ranks = mesh.ulysses_group, _ulysses_ranks(mesh)
    dist.barrier()
    if group is not None:
        degree = mesh.ulysses_degree
        times = []
        for count in (SMALL, size):
            part = max(1, count // degree)
            send = torch.zeros(part * degree, dtype=torch.uint8, device=device)
            times.append(clock(lambda s=send, p=part: all_to_all(s, [p] * degree, [p] * degree, group), device))  # type: ignore[misc]
        if mesh.ulysses_rank == 0:
            inside = len({nodes[r] for r in ranks}) == 1
            sent = size // degree * (degree - 1)
            measured.append(Transfer("all-to-all", ranks, inside, times[0], sent / times[1]))
    dist.barrier()
    ring = mesh.ring_group
    if ring is not None:
        around = mesh.ring_ranks
        reader, source = (around[(mesh.ring_rank + d) % len(around)] for d in (1, -1))
        times = []
        for count in (SMALL, size):
            send, receive = (torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(2))
            times.append(clock(lambda s=send, r=receive: start_p2p(ring, [(s, reader)], [(r, source)]).wait(), device))  # type: ignore[misc]
        if mesh.ring_rank == 0:
            inside = len({nodes[r] for r in around}) == 1
            measured.append(Transfer("ring", around, inside, times[0], size / times[1]))
    return measured


def _ulysses_ranks(mesh: UspMesh) -> tuple[int, ...]:
    first = mesh.ring_rank * mesh.ulysses_degree
    return mesh.ranks[first : first + mesh.ulysses_degree]


def speed(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Operations a second of a matrix product, bytes a second of a copy, of this rank."""
    width = 8192 if device.type == "cuda" else 512
    a = torch.randn(width, width, device=device).to(dtype)
    seconds = clock(lambda: a @ a, device)
    big: Tensor = torch.empty(2**28 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    other = torch.empty_like(big)
    copy = clock(lambda: other.copy_(big), device)
    return {"flops": 2 * width**3 / seconds, "memory_bandwidth": 2 * big.numel() / copy}
