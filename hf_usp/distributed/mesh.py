"""The 2D mesh of a context-parallel group: ulysses inside (fast links), ring outside.

Rank r of a group of ring_degree * ulysses_degree ranks has ring rank r // ulysses_degree and ulysses rank
r % ulysses_degree. Consecutive groups of the world are separate meshes (data parallelism around them).
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..compat import group_registry, group_timeout, process_groups, set_group_timeout
from ..errors import UspConfigError
from ..sharding.degrees import check_degrees
from ..sharding.schedule import ring_per_node
from ..utils.validation import check_positive_int, size_from_environment
from .comm import all_gather, group_device, init_communicator, urgent, verify_same_across_ranks
from .failures import expect_failures


@dataclass(frozen=True, eq=False)
class UspMesh:
    """This rank's place in its mesh, and the process groups of its axes.

    Build it with `UspMesh.build` or `UspMesh.from_device_mesh`, on every rank of the mesh.

    Attributes:
        ring_degree: number of ring ranks.
        ulysses_degree: number of ulysses ranks.
        ring_rank: this rank's index in the ring.
        ulysses_rank: this rank's index in its ulysses group.
        ranks: global ranks of the mesh; ring outside, ulysses inside.
        ring_group: group of its ring; None for one rank.
        ulysses_group: group of its ulysses ranks; None for one rank.
        group: group of all ranks of the mesh; None for one rank.
        ring_per_node: consecutive ring ranks on one node; 1 if unknown or different on some node.
    """

    ring_degree: int
    ulysses_degree: int
    ring_rank: int
    ulysses_rank: int
    ranks: tuple[int, ...]
    ring_group: dist.ProcessGroup | None
    ulysses_group: dist.ProcessGroup | None
    group: dist.ProcessGroup | None
    ring_per_node: int = 1

    @classmethod
    def build(cls, *, ring_degree: int, ulysses_degree: int) -> UspMesh:
        """A mesh of consecutive ranks of the default process group, whose world may be a multiple of its size.

        Without a process group only a mesh of one rank can be built. Raises `UspConfigError` where sizes do not fit.
        """
        check_positive_int(required=True, ring_degree=ring_degree, ulysses_degree=ulysses_degree)
        size = ring_degree * ulysses_degree
        if not dist.is_initialized():
            if size > 1:
                raise UspConfigError(
                    f"a mesh of {size} ranks without a process group",
                    rule="torch.distributed is initialised before a mesh of several ranks is built",
                    remedy="start with torchrun or accelerate launch and call torch.distributed.init_process_group()",
                )
            return cls(1, 1, 0, 0, (0,), None, None, None)
        rank, world = dist.get_rank(), dist.get_world_size()
        if world % size:
            raise UspConfigError(
                f"ring_degree={ring_degree} x ulysses_degree={ulysses_degree} = {size} ranks in a world of {world}",
                rule="the number of processes is a multiple of ring_degree x ulysses_degree",
                remedy=f"start a multiple of {size} processes, or choose degrees whose product divides {world}",
            )
        first = rank - rank % size
        return cls._of(tuple(range(first, first + size)), ulysses_degree)

    @classmethod
    def from_device_mesh(cls, mesh: DeviceMesh, *, ulysses_degree: int | None = None, cp_axis: str = "cp") -> UspMesh:
        """The mesh along the axis `cp_axis` of a device mesh, split into ring x ulysses.

        A device mesh with axes named "ring" and "ulysses" needs no `ulysses_degree`; without either, the whole axis is
        ulysses.
        """
        check_positive_int(ulysses_degree=ulysses_degree)
        names = mesh.mesh_dim_names or ()
        if {"ring", "ulysses"} <= set(names):
            return cls._of(tuple(mesh["ring", "ulysses"].mesh.flatten().tolist()), mesh["ulysses"].size())
        if cp_axis not in names:
            raise UspConfigError(
                f"a device mesh with axes {tuple(names)}",
                rule=f"the mesh has an axis {cp_axis!r}, or the axes 'ring' and 'ulysses'",
                remedy="name the context-parallel axis with cp_axis=...",
            )
        axis = mesh[cp_axis]
        return cls._of(tuple(axis.mesh.flatten().tolist()), ulysses_degree or axis.size())

    @classmethod
    def _of(cls, ranks: tuple[int, ...], ulysses_degree: int) -> UspMesh:
        """The mesh over these global ranks, in order. Only they take part, so other meshes of the world may differ.

        Except with a process group bound to a device (`init_process_group(device_id=...)`) under NCCL, which makes new
        groups by splitting the world: there all ranks build meshes of the same degrees at the same time.
        """
        ring_degree = check_degrees(len(ranks), ulysses_degree)
        me = ranks.index(dist.get_rank())
        ring_rank, ulysses_rank = divmod(me, ulysses_degree)
        kept("failures", expect_failures)
        group = _group("mesh", ranks)
        return cls(
            ring_degree=ring_degree,
            ulysses_degree=ulysses_degree,
            ring_rank=ring_rank,
            ulysses_rank=ulysses_rank,
            ranks=ranks,
            ring_group=_group("ring", ranks[ulysses_rank::ulysses_degree]),
            ulysses_group=_group("ulysses", ranks[ring_rank * ulysses_degree : (ring_rank + 1) * ulysses_degree]),
            group=group,
            ring_per_node=_ring_per_node(ranks, ulysses_degree, group),
        )

    @property
    def size(self) -> int:
        """Number of ranks of the mesh: the context-parallel size."""
        return self.ring_degree * self.ulysses_degree

    @property
    def rank(self) -> int:
        """This rank's place in `ranks`."""
        return self.ring_rank * self.ulysses_degree + self.ulysses_rank

    @property
    def ring_ranks(self) -> tuple[int, ...]:
        """Global ranks along the ring axis through this rank, in ring order."""
        return self.ranks[self.ulysses_rank :: self.ulysses_degree]

    def __deepcopy__(self, memo: dict) -> UspMesh:
        """Process groups cannot be copied; a copied model talks to the same ranks."""
        return self


def _ring_per_node(ranks: Sequence[int], ulysses_degree: int, group: dist.ProcessGroup | None) -> int:
    """Consecutive ring ranks that share a node, from LOCAL_WORLD_SIZE of all ranks; they have to agree."""
    if group is None:
        return 1
    size, problem, device = 0, None, group_device(group)
    try:
        size = size_from_environment("LOCAL_WORLD_SIZE", os.environ, default=0)
    except UspConfigError as refusal:
        problem = refusal
    verify_same_across_ranks(torch.zeros(1, dtype=torch.int64, device=device), problem, group, UspConfigError)
    said = torch.tensor([size], device=device)
    sizes = set(all_gather(said, group).flatten().tolist())
    if len(sizes) > 1 or sizes == {0}:
        return 1
    return ring_per_node(ranks, ulysses_degree, sizes.pop())


def batch_mesh(device_type: str, model_parallel_size: int) -> DeviceMesh:
    """All processes as data parallel x ranks that share a batch; the latter are called "tp", for dataloaders only."""
    data_parallel = dist.get_world_size() // model_parallel_size
    shape, names = (
        ((model_parallel_size,), ("tp",))
        if data_parallel == 1
        else ((data_parallel, model_parallel_size), ("dp", "tp"))
    )
    return kept_mesh(("batch", device_type, shape), lambda: init_device_mesh(device_type, shape, mesh_dim_names=names))


def consecutive_group(size: int) -> tuple[tuple[int, ...], dist.ProcessGroup | None]:
    """The `size` consecutive ranks of the world to which this one belongs, and their group; None for one rank."""
    first = dist.get_rank() // size * size
    ranks = tuple(range(first, first + size))
    return ranks, _group("mesh", ranks)


def mesh_in_force() -> bool:
    """Whether this process has built a mesh of several ranks."""
    if not dist.is_initialized():
        return False
    owner, made = group_registry().get("hf_usp", (None, {}))
    return owner is not None and owner() is _default_group() and any(key[0] == "mesh" for key in made)


def kept(key: Hashable, make: Callable[[], Any]) -> Any:
    """The first result of `make`: torch frees no group before the end, so later meshes use the same ones.

    It is kept beside torch's own record of groups, for as long as the default process group lasts.
    """
    default = _default_group()
    owner, made = group_registry().get("hf_usp", (None, {}))
    if owner is None or owner() is not default:
        made = {}
        group_registry()["hf_usp"] = (weakref.ref(default), made)
    if key not in made:
        made[key] = make()
    return made[key]


def kept_mesh(key: Hashable, make: Callable[[], DeviceMesh]) -> DeviceMesh:
    """`kept` for a device mesh, whose groups get the timeout of the default process group; torch gives them its own."""

    def timely() -> DeviceMesh:
        before, timeout = process_groups(), group_timeout(_default_group())
        mesh = make()
        if timeout is not None:
            for group in process_groups() - before:
                set_group_timeout(group, timeout)
        return mesh

    kept("failures", expect_failures)
    return kept(key, timely)


def _default_group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _group(axis: str, ranks: Sequence[int]) -> dist.ProcessGroup | None:
    """The group of these ranks along an axis; None for one rank."""
    if len(ranks) == 1:
        return None
    return kept((axis, tuple(ranks)), lambda: _new_group(ranks, axis == "ring"))


def _new_group(ranks: Sequence[int], beside_tiles: bool) -> dist.ProcessGroup:
    """beside_tiles: whether its messages are under way while the device computes."""
    timeout = group_timeout(_default_group())  # torch takes a default of its own, whatever the process group was given
    options = urgent(_default_group()) if beside_tiles else None
    given = timeout if options is None else None  # options have one of their own, and torch warns of another beside it
    group = dist.new_group(list(ranks), timeout=given, pg_options=options, use_local_synchronization=True)
    if options is not None and timeout is not None:
        set_group_timeout(group, timeout)
    init_communicator(group)
    return group
