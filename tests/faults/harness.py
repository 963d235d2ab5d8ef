"""Starts the ranks of a case, as no launcher that ends them would, and watches how each of them ends."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..ranks import PRELOAD
from .run import rank_main

EXCEPTION = re.compile(r"^(\[rank\d+\]: )?(\w+\.)*\w*(Error|Exception|Interrupt)\b")
IMPORTED = ("transformers.trainer", "transformers.models.mistral.modeling_mistral", "hf_usp.config", "hf_usp.tools.cli")


@dataclass(frozen=True)
class Ending:
    """How a rank ended: its exit code, seconds after the fault (None: it had to be ended), the last line it said."""

    code: int | None
    seconds: float | None
    said: str


def endings(folder: Path, case: dict[str, Any], world: int = 3, limit: float = 60.0) -> dict[int, Ending]:
    """Run a case of `run.train`; ranks that are there after `limit` seconds are ended."""
    import torch.distributed as dist

    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, *IMPORTED])  # once for all cases
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)  # a launcher holds it
    started = time.time()
    ranks = [
        context.Process(target=rank_main, args=(rank, world, store.port, str(folder), case), daemon=True)
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    faulty = case.get("rank", 1) if case.get("how") == "stop" else None
    ended: dict[int, float] = {}
    try:
        while len(ended) < world - (faulty is not None) and time.time() - started < limit:
            time.sleep(0.02)
            for rank, process in enumerate(ranks):
                if rank not in ended and not process.is_alive():
                    ended[rank] = time.time()
    finally:  # whatever happened here: a stopped process hears no SIGTERM, and Python would wait for it at its end
        for process in ranks:
            assert process.pid is not None
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            process.join(30)
    mark = folder / "fault"
    since = float(mark.read_text()) if mark.exists() else started
    found = {}
    for rank, process in enumerate(ranks):
        seconds = round(ended[rank] - since, 1) if rank in ended else None
        found[rank] = Ending(process.exitcode, seconds, _last(folder / f"out.{rank}"))
    return found


def _last(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if EXCEPTION.match(line)]
    return re.sub(r"^\[rank\d+\]: (\w+\.)*", "", (errors or lines or [""])[-1])
