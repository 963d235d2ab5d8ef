"""Trying random inputs: what becomes of each, in bounded time, the same for the same seed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import select
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import hf_usp

LIMIT = 30.0  # seconds after which an input hangs
Act = Callable[[], Any]
# A generator of inputs: from a random source to something to do and a description of it.
Fuzzer = Callable[[random.Random], tuple[Act, Any]]
ENDINGS = ("refused", "accepted", "raw", "hang")


class Hangs(BaseException):
    """No `Exception`: nothing that is tried may catch it."""


@dataclass
class Tally:
    """How many inputs ended how; `raw` has an example of every kind that ended in something else than a refusal."""

    ended: Counter[str] = field(default_factory=Counter)
    raw: dict[str, str] = field(default_factory=dict)

    @property
    def tried(self) -> int:
        return self.ended.total()


def try_all(fuzzer: Fuzzer, seed: int, count: int, seconds: float, forked: bool = False) -> Tally:
    """`count` inputs, or as many as fit into `seconds`; `forked`: each in a process of its own."""
    tally, end = Tally(), time.monotonic() + seconds
    for number in range(count):
        if time.monotonic() > end:
            break
        act, what = fuzzer(random.Random(seed * 1_000_003 + number))
        ending, reason = (in_a_fork if forked else judge)(act)
        tally.ended[ending] += 1
        if ending in ("raw", "hang"):
            tally.raw.setdefault(reason, f"{ending}: {reason}, of {what}"[:600])
    return tally


def judge(act: Act) -> tuple[str, str]:
    """The ending of one input, and the reason where it is a bad one. An exit status of 2 is a refusal."""
    try:
        with time_limit(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found = act()
    except hf_usp.UspError:
        return "refused", ""
    except SystemExit as leaving:
        return ("accepted" if leaving.code in (0, None) else "refused"), ""
    except Hangs:
        return "hang", f"over {LIMIT} s"
    except Exception as problem:
        frames = [f for f in traceback.extract_tb(problem.__traceback__) if "hf_usp" in f.filename]
        where = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "outside"
        return "raw", f"{type(problem).__name__} in {where}: {str(problem)[:80]!r}"
    return ("refused" if found == 2 else "accepted"), ""


def in_a_fork(act: Act) -> tuple[str, str]:
    """`judge` in a process of its own, for what may end the process or leave threads."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        os.write(write, json.dumps(judge(act)).encode())
        os._exit(0)
    os.close(write)
    said = b""
    if select.select([read], [], [], LIMIT + 10)[0]:
        said = os.read(read, 1 << 16)
    else:
        os.kill(child, signal.SIGKILL)
    os.close(read)
    _, status = os.waitpid(child, 0)
    if said:
        ending, reason = json.loads(said)
        return ending, reason
    # The command `check` ends its process itself where something is wrong: 1, or 3 for a rank that hangs, which on a
    # busy machine is one that is slow.
    code = os.waitstatus_to_exitcode(status)
    return ("accepted", "") if code in (1, 3) else ("hang", "") if code < 0 else ("raw", f"exit code {code}")


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
