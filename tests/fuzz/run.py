"""`make fuzz`: about 35,000 random inputs, how they ended as a table, kept in `results/`.

python -m tests.fuzz.run [SEED [SHARE [NAME ...]]]     SHARE: of the usual numbers of inputs (1); NAME: some of PLAN
"""

from __future__ import annotations

import functools
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path

from . import commands, flags, library
from .driver import ENDINGS, Tally, try_all

ROOT = Path(__file__).parents[2]
# Name, number of inputs, the longest that they may take together in seconds, whether each runs in its own process.
PLAN: dict[str, tuple[int, float, bool]] = {
    "shard": (8000, 240, False),
    "attention": (6000, 240, False),
    "config": (7000, 60, False),
    "mesh": (2500, 60, False),
    "plan": (1000, 240, False),
    "explain": (1000, 240, False),
    "check": (100, 240, True),
    "finetune": (300, 600, False),
}


def fuzzers(folder: Path) -> dict[str, Callable[[random.Random], tuple]]:
    """By the names of `PLAN`; files are written into `folder`."""
    found: dict[str, Callable[..., tuple]] = {}
    for module in (library, commands, flags):
        for name, function in vars(module).items():
            if name.startswith("fuzz_"):
                found[name[5:]] = function if module is library else functools.partial(function, folder)
    return {name: found[name] for name in PLAN}


def table(tallies: dict[str, Tally]) -> str:
    """Markdown."""
    lines = ["| what | tried | " + " | ".join(ENDINGS) + " |", "|---" * (2 + len(ENDINGS)) + "|"]
    for name, tally in tallies.items():
        lines.append(f"| {name} | {tally.tried:,} | " + " | ".join(f"{tally.ended[e]:,}" for e in ENDINGS) + " |")
    total = sum((tally.ended for tally in tallies.values()), start=Tally().ended)
    lines.append(f"| all | {total.total():,} | " + " | ".join(f"{total[e]:,}" for e in ENDINGS) + " |")
    return "\n".join(lines)


def main(seed: int = 1, share: float = 1.0, *names: str) -> int:
    """Exit status 1 where an input ended in a raw error or a hang."""
    import datasets

    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    tallies: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # names such as "out.png" are of this folder
        for name, fuzzer in fuzzers(Path(folder)).items():
            if names and name not in names:
                continue
            count, seconds, forked = PLAN[name]
            tallies[name] = try_all(fuzzer, seed, max(1, round(count * share)), seconds, forked)
            print(name, dict(tallies[name].ended), flush=True)
        ran = (Path(folder) / "ran").exists()
    examples = [example for tally in tallies.values() for example in tally.raw.values()]
    title = ", ".join([f"# Random input, seed {seed}", *names])
    text = f"{title}\n\n{table(tallies)}\n\nCode of a model was {'RUN' if ran else 'not run'}.\n"
    text += "".join(f"\n    {example}" for example in examples) + ("\n" if examples else "")
    print(text)
    file = "-".join(["fuzz", str(date.today()), *names])
    (ROOT / "results" / f"{file}.md").write_text(text, encoding="utf-8")
    return int(bool(examples) or ran)


if __name__ == "__main__":
    sys.exit(main(*(kind(text) for kind, text in zip((int, float), sys.argv[1:], strict=False)), *sys.argv[3:]))
