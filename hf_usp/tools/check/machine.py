"""The measured rates as a machine for `hf-usp plan --machine check.json`."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .results import Results


def measured_machine(it: Results) -> dict[str, Any] | None:
    """Rates of one rank, and a link for each level; None where nothing was measured."""
    if not it.speed or not it.facts:
        return None
    counts = [it.nodes.count(node) for node in dict.fromkeys(it.nodes)]
    links = []
    for inside, ranks in ((True, min(counts)), (False, it.world)):
        alike = [t for t in it.transfers if t.inside == inside]
        # The rate that all ranks reach at the same time, as they talk in a step: exchanges before pairs.
        chosen = [t for t in alike if t.kind == "all-to-all"] or [t for t in alike if t.kind == "ring"] or alike
        if chosen:
            links.append(
                {
                    "ranks": ranks,
                    "bandwidth": median(t.bandwidth for t in chosen),
                    "latency": median(t.latency for t in chosen),
                }
            )
    on_host = max(1, it.facts[0]["host"] and sum(f["host"] == it.facts[0]["host"] for f in it.facts))
    shared = it.facts[0]["device"].startswith("cpu")
    return {
        "name": it.facts[0]["device"],
        "matmul_flops": min(s["flops"] for s in it.speed),
        "memory_bandwidth": min(s["memory_bandwidth"] for s in it.speed),
        "memory": it.facts[0]["memory"] // (on_host if shared else 1),
        "links": links,
    }
