"""Writes docs/models.md: builds, runs and judges every architecture (about five minutes on two cores).

With the oldest supported Transformers (`make table-oldest`) it writes a section of docs/versions.md instead.

python -m tests.models.write_table                          # all, and the page
python -m tests.models.write_table llama gemma3             # these only, printed
python -m tests.models.write_table --update llama gemma3    # these, and their rows of the page
"""

from __future__ import annotations

import sys
import time

from hf_usp.compat import OLDEST

from ..ranks import Ranks
from . import versions_page
from .census import subjects
from .table import PATH, render, update, versions, written_with
from .verdict import judge


def main(names: list[str]) -> None:
    updates = names[:1] == ["--update"]
    names = names[updates:]
    ranks, verdicts, start = Ranks(4), {}, time.time()
    try:
        for name in names or subjects():
            verdicts[name] = judge(ranks, name)
            verdict = verdicts[name]
            seconds = time.time() - start
            print(f"{seconds:4.0f} s {name}: {verdict.summary()} {verdict.error:.0e} {verdict.reason()}", flush=True)
    finally:
        ranks.stop()
    if not names and versions()["transformers"].startswith(f"{dict(OLDEST)['transformers']}."):
        versions_page.write(verdicts)
    elif not names:
        PATH.write_text(render(verdicts))
    elif updates and written_with(PATH.read_text()) == versions():
        PATH.write_text(update(PATH.read_text(), verdicts))


if __name__ == "__main__":
    main(sys.argv[1:])
