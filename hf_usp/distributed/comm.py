"""Communication between ranks: the only module that calls torch's collectives and point-to-point operations.

`all_to_all` runs along the ulysses axis, `start_p2p` along the ring axis. Every rank of a group makes the same sequence
of calls, so messages between two ranks match in order without tags. Ranks are global ranks, as torch's point-to-point
operations take them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..compat import all_gather_into, group_by_name
from ..errors import UspBatchError, UspError
from ..utils.profiling import EXCHANGE, WAIT, annotate
from ..utils.upload import download
from .failures import on_every_rank, translate_connection_errors
from .waiting import ALONE, wait_for_all

Group = dist.ProcessGroup


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


class P2PHandle:
    """Messages under way. `wait()` returns once the received tensors may be read and the sent ones be reused."""

    def __init__(self, works: Sequence[dist.Work], sent: Sequence[Tensor]) -> None:
        self._works = works
        self._sent = sent  # kept alive until the transfer is over

    @translate_connection_errors
    def wait(self) -> None:
        annotate(WAIT, self._wait)
        self._works, self._sent = (), ()

    def _wait(self) -> None:
        for work in self._works:
            work.wait()


@translate_connection_errors
def start_p2p(group: Group, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> P2PHandle:
    """Start sending and receiving contiguous tensors, each with a global rank; empty tensors are not sent.

    Both sides must agree on which messages are empty; the plan sees to that.
    """
    ops = [dist.P2POp(dist.isend, tensor, peer, group) for tensor, peer in sends if tensor.numel()]
    ops += [dist.P2POp(dist.irecv, tensor, peer, group) for tensor, peer in receives if tensor.numel()]
    works = annotate(EXCHANGE, dist.batch_isend_irecv, ops) if ops else ()
    return P2PHandle(works, [tensor for tensor, _ in sends])


@translate_connection_errors
def all_to_all(send: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], group: Group) -> Tensor:
    """Exchange slices of the first dim: slice i of `send` goes to group rank i, slice j of the result came from j."""
    received = send.new_empty(sum(receive_sizes), *send.shape[1:])
    sizes = list(receive_sizes), list(send_sizes)
    annotate(EXCHANGE, dist.all_to_all_single, received, send, *sizes, group=group)
    return received


@torch.library.custom_op("hf_usp::exchange", mutates_args=())
def _exchange(send: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], group_name: str) -> Tensor:
    return all_to_all(send, send_sizes, receive_sizes, group_by_name(group_name))


@_exchange.register_fake
def _(send: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], group_name: str) -> Tensor:
    return send.new_empty(sum(receive_sizes))


def all_to_all_custom_op(send: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], group: Group) -> Tensor:
    """`all_to_all` as the operator `torch.ops.hf_usp.exchange`, which selective checkpointing can keep."""
    return torch.ops.hf_usp.exchange(send, send_sizes, receive_sizes, group.group_name)


@translate_connection_errors
def all_gather(tensor: Tensor, group: Group | None, begins: bool = False) -> Tensor:
    """The tensors of one shape [...] of all ranks of a group, as [P, ...]; None is the group of this rank alone.

    begins: a forward, to which ranks may come late; see `wait_for_all`.
    """
    if group is None:
        return tensor.contiguous()[None]
    size = dist.get_world_size(group)
    gathered = tensor.new_empty(size * tensor.numel())
    if begins and tensor.device.type != "cpu":
        torch.accelerator.current_stream(tensor.device).synchronize()  # what this rank still computes is no wait
    work = all_gather_into(gathered, tensor.contiguous().view(-1), group, async_op=begins)
    if work is not None:
        wait_for_all(work, group)
    return gathered.view(size, *tensor.shape)


@translate_connection_errors
def all_reduce_sum(value: Tensor, group: Group | None) -> Tensor:
    """Sum of a tensor over a group, in a new tensor; None is the group of this rank alone."""
    total = value.detach().clone(memory_format=torch.contiguous_format)
    if group is not None:
        dist.all_reduce(total, group=group)
    return total


def verify_same_across_ranks(
    fingerprint: Tensor,
    error: Exception | None,
    group: Group | None,
    kind: type[UspError] = UspBatchError,
    begins: bool = False,
    beside: Sequence[Tensor | None] = (),
) -> list[np.ndarray | None]:
    """Raise on every rank of the group when one has an error, or when their fingerprints [N] differ.

    One tiny message; a second one, with the texts, only when something is wrong. So no rank is left waiting in a
    collective that another one never enters. `fingerprint` is int64 and of the same length everywhere; `kind` is what
    the ranks without an error of their own raise; `begins` as in `all_gather`. Returns the values of `beside`, which
    come to the host in the same copy.
    """
    if group is None and error is not None:
        raise error
    flag = torch.full_like(fingerprint[:1], error is not None)
    gathered = all_gather(torch.cat([flag, fingerprint]), group, begins=begins)
    agreed, *values = download([gathered, *beside])
    assert agreed is not None
    rows = agreed.tolist()
    if rows[0][0] == 0 and all(row == rows[0] for row in rows):
        return values
    ranks = dist.get_process_group_ranks(group)
    texts: list[str | None] = [None] * len(ranks)
    dist.all_gather_object(texts, None if error is None else f"{type(error).__name__}: {error}", group=group)
    if error is not None:
        raise on_every_rank(error)
    if any(texts):
        failed = "; ".join(f"rank {ranks[i]}: {text}" for i, text in enumerate(texts) if text)
        raise on_every_rank(
            kind(
                f"another rank of this context-parallel group refused ({failed})",
                rule="what one rank of a group cannot compute, none of them begins",
                remedy="follow the remedy in that rank's message; this rank itself found nothing wrong",
            )
        )
    differing = [str(ranks[i]) for i in range(len(ranks)) if rows[i] != rows[0]]
    raise on_every_rank(
        UspBatchError(
            f"the batch of rank(s) {', '.join(differing)} differs from that of rank {ranks[0]} in the same "
            "context-parallel group (or the order or kernel given with it)",
            rule="all ranks of a context-parallel group get the same full batch, bit by bit, and each takes its share "
            "of it",
            remedy="let accelerator.prepare wrap the dataloader; seed what is random in dataset or collator equally; "
            + ALONE,
        )
    )


@translate_connection_errors
def all_gather_objects(thing: Any) -> list[Any]:
    """Something of every process of the world, by rank; all of them call this. For small things that can be pickled."""
    said: list[Any] = [thing] * world_size()
    if len(said) > 1:
        dist.all_gather_object(said, thing)
    return said


@translate_connection_errors
def broadcast_object(thing: Any, source: int, group: Group) -> Any:
    """Broadcast a small object that can be pickled from the global rank `source` to every rank of a group."""
    box = [thing]
    dist.broadcast_object_list(box, src=source, group=group)
    return box[0]


def _backends(group: Group) -> dict[str, str]:
    """Kind of device -> backend; a group may have one for each ("cpu:gloo,cuda:nccl")."""
    return dict(part.split(":") for part in dist.get_backend_config(group).split(","))


def group_device(group: Group) -> torch.device:
    """Where small tensors for this group's collectives live."""
    return torch.device("cpu") if "cpu" in _backends(group) else _accelerator()


def _accelerator() -> torch.device:
    found = torch.accelerator.current_accelerator()
    assert found is not None
    return torch.device(found.type, torch.accelerator.current_device_index())


def urgent(like: Group) -> Any:
    """Options of a new group whose messages get a place before kernels that compute; None without NCCL in `like`.

    Its stream has a high priority: of two kernels that wait for a place, a message and a tile, the message begins.
    """
    if "nccl" not in _backends(like).values():
        return None
    return dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)


def init_communicator(group: Group) -> None:
    """Connect all ranks of a new group on the devices that their tensors will be on.

    NCCL makes its communicator in the first call, in which all ranks have to take part; a pruned exchange may leave
    some out.
    """
    if torch.accelerator.is_available() and _backends(group).get(_accelerator().type, "gloo") != "gloo":
        dist.all_reduce(torch.zeros(1, device=_accelerator()), group=group)
