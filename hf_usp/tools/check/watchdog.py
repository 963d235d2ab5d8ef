"""Stages that all ranks go through together, and a watch that names the rank that does not.

Ranks meet in a key-value store (the launcher's), not in collectives: that works where collectives hang. A thread of
every rank looks at the clock while its main thread may be stuck in a transfer. When a stage takes too long, or a rank
fails, rank 0 says who; if it is the one that hangs, the lowest rank that got further does.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from ...errors import UspConfigError
from ...utils.validation import size_from_environment

HANGS = 3
GRACE = 5.0
# Of a call to the store itself; stages have a clock of their own.
WAITS = "waiting in"
WAITING_FILES = ("distributed_c10d.py", "hf_usp/distributed/comm.py", "check/stages.py")
PATIENCE = timedelta(days=1)


class Stages:
    """The stages of one rank. `say(texts)` reports what went wrong, on the one rank that speaks."""

    def __init__(self, rank: int, world: int, timeout: float, say: Callable[[list[str]], None]) -> None:
        self.rank, self.world, self.timeout, self.say = rank, world, timeout, say
        self.name, self.number = "start", 0
        self.deadline = time.monotonic() + timeout
        self.over = False
        self.store = self._connect()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _connect(self, hosts: bool = True) -> dist.Store:
        """The launcher's store, or one that rank 0 holds."""
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        port = size_from_environment("MASTER_PORT", os.environ, 29500, most=65535)
        of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        start_time = timedelta(seconds=self.timeout)
        mine = hosts and self.rank == 0 and not of_agent
        try:
            store = dist.TCPStore(address, port, None, mine, start_time, wait_for_workers=False)
        except (RuntimeError, OSError) as problem:
            reason = f"{problem} ".splitlines()[0]
            raise UspConfigError(
                f"no meeting point at {address}:{port} (MASTER_ADDR, MASTER_PORT): {reason}",
                rule="rank 0 listens there, on a free port of its host, and all other ranks reach it",
                remedy="start the ranks with torchrun or accelerate launch, or export the name of rank 0's host and a "
                "free port on every rank",
            ) from problem
        store.set_timeout(PATIENCE)
        return dist.PrefixStore(f"hf-usp-check-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    @contextmanager
    def stage(self, name: str, seconds: float = 0.0) -> Iterator[None]:
        """A stage of `timeout` and `seconds`; it ends when every rank has ended it."""
        self.number, self.name = self.number + 1, name
        self.deadline = time.monotonic() + self.timeout + seconds
        self.store.set(f"stage/{self.rank}", f"{self.number} {name}")
        try:
            yield
            self.meet(f"end/{self.number}")
        except Exception as problem:
            traceback.print_exc(file=sys.stderr)
            self.store.set(f"error/{self.rank}", f"{type(problem).__name__}: {problem}".splitlines()[0])
            self.store.add("failed", 1)
            time.sleep(3600)  # the watch ends this process once the speaker has spoken

    def meet(self, name: str) -> None:
        """Wait until every rank has come here."""
        self.store.set(f"{name}/{self.rank}", "1")
        self.store.wait([f"{name}/{rank}" for rank in range(self.world)])

    def exchange(self, name: str, text: str) -> list[str]:
        """The texts of all ranks."""
        self.store.set(f"{name}/{self.rank}", text)
        return [self.store.get(f"{name}/{rank}").decode() for rank in range(self.world)]

    def done(self) -> None:
        """Nothing is watched any more."""
        self.over = True

    def _watch(self) -> None:
        store = self._connect(hosts=False)
        while not self.over:
            time.sleep(0.2)
            failed = store.check(["failed"])
            late = time.monotonic() > self.deadline or store.check(["late"])
            if not (failed or late) or self.over:
                continue
            store.set("late", "1")
            store.set(f"where/{self.rank}", _whereabouts())
            time.sleep(2.0)  # others say where they are, or fail of the same reason
            progress = [self._of(store, rank) for rank in range(self.world)]
            errors = {r: store.get(f"error/{r}").decode() for r in range(self.world) if store.check([f"error/{r}"])}
            stuck = {} if errors else self._stuck(store, progress)
            speaker = next((r for r in range(self.world) if r not in stuck), 0)
            if self.rank == speaker:
                self.say(self._texts(progress, errors, stuck))
            else:
                time.sleep(GRACE)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1 if errors else HANGS)

    def _stuck(self, store: dist.Store, progress: list[tuple[int, str]]) -> dict[int, str]:
        """Ranks that the others wait for, and where they are: dead ones, those behind, those that compute for ever."""
        where = {r: store.get(f"where/{r}").decode() for r in range(self.world) if store.check([f"where/{r}"])}
        silent = [r for r in range(self.world) if r not in where]
        behind = [r for r, (number, _) in enumerate(progress) if number < max(p[0] for p in progress)]
        busy = [r for r, text in where.items() if not text.startswith(WAITS)]
        for ranks in (silent, behind, busy):
            if 0 < len(ranks) < self.world:
                return {r: where.get(r, "its process does not answer") for r in ranks}
        return {}

    def _of(self, store: dist.Store, rank: int) -> tuple[int, str]:
        """Number and name of the stage that a rank is in; a stage it has ended counts half more."""
        if not store.check([f"stage/{rank}"]):
            return 0, "never started"
        number, name = store.get(f"stage/{rank}").decode().split(" ", 1)
        ended = store.check([f"end/{number}/{rank}"])
        return 2 * int(number) + ended, name

    def _texts(self, progress: list[tuple[int, str]], errors: dict[int, str], stuck: dict[int, str]) -> list[str]:
        if errors:
            return [f"rank {rank} failed in the stage {progress[rank][1]!r}: {text}" for rank, text in errors.items()]
        if not stuck:
            return [f"all ranks hang in the stage {self.name!r} ({self.timeout:.0f} s): no message gets through"]
        texts = []
        for rank, where in stuck.items():
            number, name = progress[rank]
            stage = "it never started" if number == 0 else f"in the stage {name!r}, {where}"
            texts.append(f"rank {rank} hangs: {stage}; the others wait ({self.timeout:.0f} s)")
        return texts


def _whereabouts() -> str:
    """Where the main thread of this process is: waiting for other ranks, or in which line."""
    frames = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident or 0])
    last = frames[-1]
    waits = any(frame.filename.endswith(WAITING_FILES) or frame.name == "synchronize" for frame in frames[-6:])
    return f"{WAITS if waits else 'at'} {last.name} ({os.path.basename(last.filename)}:{last.lineno})"
