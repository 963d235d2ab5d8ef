"""All faults at all places, as a table: `python -m tests.faults [PATTERN]`; a quarter of an hour on two cores."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from pathlib import Path

from .harness import Ending, endings
from .run import PLACES

TIMEOUT = 8
CASES = {
    f"{place}, {how}": {"place": place, "how": how, "timeout": TIMEOUT if how == "stop" else 60}
    for place in PLACES
    for how in ("raise", "kill", "stop")
} | {
    "evaluation under data parallelism, raise": {"place": "evaluation", "mesh": (2, 1)},
    "backward, CUDA error: the launch timed out": {"place": "backward", "how": "CUDA error: the launch timed out"},
    "backward, no connection to the loss": {"place": "backward", "how": "no connection between layer and loss"},
    "backward, a text that is no UTF-8": {"place": "backward", "how": "cannot read data_\udcff.txt"},
    "backward, a text of 20 MB": {"place": "backward", "how": "20 MB " + 20_000_000 * "x"},
    "another ulysses_degree": {"other": {"ulysses_degree": 3}},
    "another cp_size": {"other": {"cp_size": 1}},
    "another sequence_order": {"other": {"sequence_order": "contiguous"}},
    "another self_check": {"other": {"self_check": False}},
    "another gather_outputs": {"other": {"gather_outputs": True}},
    "another sliding_window": {"model": {"sliding_window": 7}},
    "bf16 on one rank": {"args": {"bf16": True}},
    "gradient_checkpointing on one rank": {"args": {"gradient_checkpointing": True}},
    "other weights in evaluate()": {"seed": 5, "evaluate": True, "options": {"self_check": False}},
}


def row(name: str, found: dict[int, Ending], rank: int = 1) -> str:
    """Of the others what they say without rule and remedy, the common beginning left out."""
    others = [ending for other, ending in found.items() if other != rank]
    slowest = max(e.seconds if e.seconds is not None else float("inf") for e in others)
    said = [
        e.said.partition(". Rule:")[0].replace("usp: another rank failed while this one waited for it", "...")
        for e in others
    ]
    texts = [f"{text[:230]} ({said.count(text)} x)" for text in sorted(set(said))]
    return f"| {name[:60]} | {slowest:g} s | {'<br>'.join(texts)} |"


def main() -> None:
    pattern = sys.argv[1] if len(sys.argv) > 1 else ""
    print("| fault | the others end after | and say |\n|---|---|---|", flush=True)
    for name, case in CASES.items():
        if re.search(pattern, name):
            folder = Path(tempfile.mkdtemp())
            world = 4 if "mesh" in case else 3
            print(row(name, endings(folder, case, world, limit=90)), flush=True)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
