"""Names in a profile: what a step spends on exchanges, tiles and merges.

    with torch.profiler.profile() as profile: ...      # shows ranges usp.exchange, usp.wait, usp.tiles, usp.merge

A range that no profiler asks for costs one question.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch.profiler import record_function

from ..compat import profiler_enabled

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# usp.exchange: a message is handed over (an all-to-all on CPU also waits in it); usp.wait: the step waits for one;
# usp.tiles: kernels; usp.merge: their results are merged.
EXCHANGE, WAIT, TILES, MERGE = "usp.exchange", "usp.wait", "usp.tiles", "usp.merge"


def annotate(
    name: str, function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
) -> Result:
    """`function(*args, **kwargs)`, as a range of this name in the profile that is being taken, if one is."""
    if not profiler_enabled():
        return function(*args, **kwargs)
    with record_function(name):
        return function(*args, **kwargs)
