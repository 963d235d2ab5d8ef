"""A rank that fails alone: the others end with its cause, instead of a lost connection.

A rank that raises inside a sharded forward or backward leaves others in an exchange that it never joins. Before its
exception goes on, it leaves word in the store of the process group. The exception ends its process, which closes its
connections; a rank that loses one looks into the store and raises `UspRankError` with that cause. While all is well
this costs nothing: no message, no thread. Where waiting ranks do not notice closed connections (NCCL on one node), the
launcher ends them, as it does without us.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

# Where the ranks of a run found each other; private in torch 2.11 to 2.13.
from torch.distributed.distributed_c10d import _get_default_store

from .errors import UspRankError

KEY = "hf_usp/failure"
LOST = ("onnection", "imed out", "roken pipe")


def on_every_rank(problem: Exception) -> Exception:
    """Mark an exception of which the ranks of a mesh have told each other: each of them raises one."""
    problem.on_every_rank = True  # type: ignore[attr-defined]
    return problem


def tell_failure(problem: BaseException) -> None:
    """Leave word of an exception of this rank that others may not know of; the first one stands."""
    known = isinstance(problem, UspRankError) or getattr(problem, "on_every_rank", False)
    if dist.is_initialized() and not known:
        word = f"rank {dist.get_rank()} raised {type(problem).__name__}: {problem}"
        with suppress(RuntimeError):  # the store may be gone already
            _get_default_store().compare_set(KEY, "", word)


def elsewhere(problem: BaseException) -> UspRankError | None:
    """What to raise for an exception that comes from a lost connection; None for any other."""
    if not isinstance(problem, RuntimeError) or not any(part in str(problem) for part in LOST):
        return None
    word = "a rank ended without leaving word"
    with suppress(RuntimeError):
        store = _get_default_store()
        if store.check([KEY]):
            word = store.get(KEY).decode()
    return UspRankError(
        f"another rank failed while this one waited for it: {word}",
        rule="all ranks of a mesh take part in every forward and backward",
        remedy="solve what that rank reports (out of memory: a larger cp_size, a smaller batch, gradient "
        "checkpointing or loss_chunk), then start all ranks anew, from hf_usp.checkpoint.last_complete(folder)",
    )


def after(problem: BaseException) -> UspRankError:
    """For a rank that goes on after it failed (auto_find_batch_size does) while others still wait for it."""
    return UspRankError(
        f"a forward after this rank failed with {type(problem).__name__}: {problem}",
        rule="ranks that waited for this one in the failed pass cannot be called back",
        remedy="start all ranks anew; with several processes auto_find_batch_size finds nothing once a rank failed: "
        "set per_device_train_batch_size",
    )


@contextmanager
def telling(owners: Iterable[Any]) -> Iterator[None]:
    """Leave word of an exception, also in `failed` of the owners; a lost connection becomes the cause of another rank.

    Owners: the hooks of the models in question (`ShardedForward`).
    """
    try:
        yield
    except Exception as problem:
        for owner in owners:
            owner.failed = problem
        cause = elsewhere(problem)
        if cause is not None:
            raise cause from problem
        tell_failure(problem)
        raise


def explained(function: Callable[..., Any]) -> Callable[..., Any]:
    """For functions that communicate: a lost connection is raised as the cause that another rank left."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except RuntimeError as problem:
            cause = elsewhere(problem)
            if cause is None:
                raise
            raise cause from problem

    return call
