"""Names in a profile: what a step spends on exchanges, tiles and merges.

    with torch.profiler.profile() as profile: ...      # shows ranges usp.exchange, usp.wait, usp.tiles, usp.merge

A range that no profiler asks for costs one question.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch.profiler import record_function

from ..compat import profiler_enabled

# usp.exchange: a message is handed over (an all-to-all on CPU also waits in it); usp.wait: the step waits for one;
# usp.tiles: kernels; usp.merge: their results are merged.
EXCHANGE, WAIT, TILES, MERGE = "usp.exchange", "usp.wait", "usp.tiles", "usp.merge"


def annotate(name: str) -> AbstractContextManager[object]:
    """A range of this name in the profile that is being taken, if one is."""
    return record_function(name) if profiler_enabled() else nullcontext()
