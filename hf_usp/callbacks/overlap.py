"""Time of a profiled step that was spent waiting for other ranks.

On a GPU: time in which NCCL kernels run and no other kernel does, over the time from the first kernel to the last. On
CPU: time that the training thread spends handing over messages and waiting for them (ranges of
`hf_usp.utils.profiling`; a gloo all-to-all waits inside), over the whole step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.autograd import DeviceType
from torch.profiler import profile

from ..utils.profiling import EXCHANGE, WAIT

Span = tuple[float, float]


def exposed_share(of: profile) -> float:
    """Between 0 and 1."""
    events = list(of.events() or ())
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.name.startswith(("usp.", "Memset"))]
    if torch.cuda.is_available() and kernels:
        talk = merged((e.time_range.start, e.time_range.end) for e in kernels if "nccl" in e.name.lower())
        work = merged((e.time_range.start, e.time_range.end) for e in kernels if "nccl" not in e.name.lower())
        both = merged([*talk, *work])
        return 0.0 if not both else (length(both) - length(work)) / (both[-1][1] - both[0][0])
    spans = merged((e.time_range.start, e.time_range.end) for e in events)
    waiting = merged((e.time_range.start, e.time_range.end) for e in events if e.name in (EXCHANGE, WAIT))
    return length(waiting) / (spans[-1][1] - spans[0][0]) if spans else 0.0


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same times as disjoint spans in order."""
    result: list[Span] = []
    for start, stop in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], stop))
        else:
            result.append((start, stop))
    return result


def length(spans: Iterable[Span]) -> float:
    """Time covered by disjoint spans."""
    return sum(stop - start for start, stop in spans)
