"""When one rank fails, the others raise its cause and its rank instead of a lost connection.

A rank that raises leaves others in an exchange that it never joins. Before its exception goes on, it leaves word in the
store of the process group: from a sharded forward or backward at once, from anywhere else when the exception ends the
process. That closes its connections; a rank that loses one, or waits in vain, looks into the store and raises
`UspRankError` with that cause. Where nobody left word, ranks that wait write their names down, and the missing one is
it. While all is well this costs nothing: no message, no thread. Where waiting ranks do not notice closed connections
(NCCL on one node), the launcher ends them, as it does without us.
"""

from __future__ import annotations

import functools
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..compat import default_store, group_timeout
from ..errors import UspRankError

KEY = "hf_usp/failure"  # why the run fails, in words
WAITING = "hf_usp/waiting"  # names of ranks that wait for another one in vain: "0 3 1 "
PROCESSES = "hf_usp/processes"  # of each host: "rank:process rank:process "
LOST = ("connection", "timed out", "timeout", "broken pipe", "pair closure", "remote process", "aborted")
PATIENCE = 4.0  # seconds until all ranks that wait have written their names
LONGEST = 4096  # bytes of a word


def on_every_rank(problem: Exception) -> Exception:
    """Mark an exception of which the ranks of a mesh have told each other: each of them raises one."""
    problem.on_every_rank = True  # type: ignore[attr-defined]
    return problem


def lost_connection(problem: BaseException | None) -> bool:
    """Whether an exception comes from a connection to another rank, as torch's backends tell of it."""
    if not isinstance(problem, RuntimeError):
        return False
    text = str(problem)
    of_a_backend = isinstance(problem, dist.DistError) or "gloo" in text or "NCCL" in text
    return of_a_backend and any(part in text.lower() for part in LOST)


def report_failure(problem: BaseException) -> None:
    """Leave word of an exception of this rank that others may not know of; the first one stands."""
    known = isinstance(problem, UspRankError) or getattr(problem, "on_every_rank", False)
    if dist.is_initialized() and not known and not lost_connection(problem):
        _answer(lambda: _leave(f"rank {dist.get_rank()} raised {type(problem).__name__}: {problem}"))


def remote_failure(problem: BaseException) -> UspRankError | None:
    """The error to raise for an exception that comes from a lost connection; None for any other."""
    if not lost_connection(problem) or not dist.is_initialized():
        return None
    late = any(part in str(problem).lower() for part in ("timed out", "timeout"))
    return UspRankError(
        f"another rank failed while this one waited for it: {_answer(lambda: _cause(late)) or _nameless(late)}",
        rule="all ranks of a mesh take part in every forward and backward",
        remedy="solve what that rank reports (out of memory: a larger cp_size, a smaller batch, gradient "
        "checkpointing or loss_chunk_size), then start all ranks again, from "
        "hf_usp.callbacks.checkpoint.get_last_complete_checkpoint(folder)",
    )


def refuse_after_failure(problem: BaseException) -> UspRankError:
    """For a rank that goes on after it failed (auto_find_batch_size does) while others still wait for it."""
    return UspRankError(
        f"a forward after this rank failed with {type(problem).__name__}: {problem}",
        rule="ranks that waited for this one in the failed pass cannot be called back",
        remedy="start all ranks anew; with several processes auto_find_batch_size finds nothing once a rank failed: "
        "set per_device_train_batch_size",
    )


@contextmanager
def reporting_failures(owners: Iterable[Any]) -> Iterator[None]:
    """Leave word of an exception, also in `failed` of the owners; a lost connection becomes the cause of another rank.

    Owners: the hooks of the models in question (`ContextParallelHooks`).
    """
    try:
        yield
    except Exception as problem:
        for owner in owners:
            owner.failed = problem
        cause = remote_failure(problem)
        if cause is not None:
            raise cause from problem
        report_failure(problem)
        raise


def translate_connection_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """For functions that communicate: a lost connection is raised as the cause that another rank left."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except RuntimeError as problem:
            cause = remote_failure(problem)
            if cause is None:
                raise
            raise cause from problem

    return call


class LastWord:
    """`sys.excepthook` of a process with a mesh: an exception that ends it leaves word, or shows another rank's cause.

    `remove()` puts back the hook that was there before.
    """

    def __init__(self) -> None:
        self.previous, sys.excepthook = sys.excepthook, self

    def __call__(self, kind: type[BaseException], problem: BaseException, trace: Any) -> None:
        cause = remote_failure(problem)
        if cause is None:
            report_failure(problem)
            self.previous(kind, problem, trace)
        else:
            cause.__cause__ = problem
            self.previous(type(cause), cause, cause.__traceback__)

    def remove(self) -> None:
        if sys.excepthook is self:
            sys.excepthook = self.previous


def expect_failures() -> None:
    """Of this process, once for each process group: its last word will be heard, and others on its host may find it."""
    if not isinstance(sys.excepthook, LastWord):
        LastWord()
    _answer(lambda: _append(f"{PROCESSES}/{_host()}", f"{dist.get_rank()}:{os.getpid()} "))


def _answer(ask: Callable[[], Any]) -> Any:
    """The value in the store; None where it does not answer, for its owner may be the rank that hangs."""
    answers: list[Any] = []

    def work() -> None:
        with suppress(Exception):
            answers.append(ask())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(2 * PATIENCE)
    return answers[0] if answers else None


def _leave(word: str) -> None:
    """Texts of others may be long, and hold what is no UTF-8 (names of files do)."""
    short = word.encode("utf-8", "backslashreplace")[:LONGEST].decode("utf-8", "ignore")
    default_store().compare_set(KEY, "", short)


def _append(key: str, text: str) -> None:
    """Of torch's stores only those over the network can."""
    default_store().append(key, text)


def _cause(late: bool) -> str:
    """The word that a rank has left; else this rank finds out with the others who wait, and leaves word for them."""
    store, started, named = default_store(), time.monotonic(), False
    while not store.check([KEY]):
        if not named:
            _append(WAITING, f"{dist.get_rank()} ")
            named = True
        silent = set(range(dist.get_world_size())).difference(map(int, store.get(WAITING).split()))
        here = _processes(store)
        states = {rank: _state(here[rank]) for rank in silent & here.keys()}
        ended = sorted(rank for rank, state in states.items() if state in ("", "Z", "X"))
        if ended:
            _leave(f"{_ranks(ended)} ended without leaving word")
        elif len(silent) <= 1 or time.monotonic() - started > PATIENCE:
            if not late:
                silent = silent - states.keys() or silent
            stopped = any(states.get(rank) in ("T", "t") for rank in silent)
            _leave(_ranks(sorted(silent)) + _nameless(late).removeprefix("a rank") + " (it is stopped)" * stopped)
        else:
            time.sleep(0.05)
    return store.get(KEY).decode("utf-8", "replace")


def _nameless(late: bool) -> str:
    if not late:
        return "a rank ended without leaving word"
    timeout = None if dist.group.WORLD is None else group_timeout(dist.group.WORLD)
    return "a rank did not answer " + ("in time" if timeout is None else f"for {timeout.total_seconds():g} s")


def _ranks(ranks: list[int]) -> str:
    if len(ranks) < 2:
        return f"rank {ranks[0]}" if ranks else "a rank"
    return f"one of the ranks {', '.join(map(str, ranks))}"


def _host() -> str:
    """This machine, as far as numbers of processes mean the same."""
    try:
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def _processes(store: dist.Store) -> dict[int, int]:
    """Rank -> number of its process, of those on this host."""
    key = f"{PROCESSES}/{_host()}"
    pairs = store.get(key).decode().split() if store.check([key]) else []
    return {int(rank): int(process) for rank, process in (pair.split(":") for pair in pairs)}


def _state(process: int) -> str:
    """The letter that Linux gives for a process ("T": stopped, "Z": ended); "" for one that is gone, "?": unknown."""
    if not Path("/proc/self/stat").exists():
        return "?"
    try:
        return Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
