"""`hf-usp check` on a cluster with a fault, for tests/tools/test_check.py: `faulty_check.py FAULT RANK ARGUMENTS`."""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import Any

import hf_usp.tools.check.run  # noqa: F401  the function of that name hides the module
from hf_usp.tools.check import exactness as exact
from hf_usp.tools.check import links
from hf_usp.tools.cli import main

run: Any = sys.modules["hf_usp.tools.check.run"]

fault, where = sys.argv[1], int(sys.argv[2])
core_error, facts, attention, post = run.core_error, run.facts, exact.usp_attention, links.start_p2p
rank = int(os.environ["RANK"])


def hang(*args: Any, **kwargs: Any) -> float:
    time.sleep(600)
    return core_error(*args, **kwargs)


def other_version(*args: Any, **kwargs: Any) -> dict[str, Any]:
    found = facts(*args, **kwargs)
    return {**found, "versions": {**found["versions"], "transformers": "5.17.0"}}


def slightly_wrong(*args: Any, **kwargs: Any) -> Any:
    return attention(*args, **kwargs) * 1.01


def fail(*args: Any, **kwargs: Any) -> float:
    raise RuntimeError("out of memory")


def slow_link(group: Any, sends: Any, receives: Any) -> Any:
    """Messages from the rank with the fault to the one two further down take long."""
    time.sleep(0.1 * any(to == where - 2 for _, to in sends))
    return post(group, sends, receives)


if fault == "wrong":
    # Two nodes, and a hostfile that names them in turn.
    socket.gethostname = lambda: f"node{rank % 2}"
if rank == where:
    if fault == "hang":
        run.core_error = hang
    elif fault == "fail":
        run.core_error = fail
    else:
        run.facts, exact.usp_attention, links.start_p2p = other_version, slightly_wrong, slow_link
sys.exit(main(sys.argv[3:]))
