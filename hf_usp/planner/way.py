"""The way of one batch to save memory, for `memory="auto"`: the fastest that fits, as `hf-usp plan --auto` takes it.

Decided from what all ranks of a mesh know equally: the model's config, sizes, and memory that they have agreed on.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UspConfigError
from .memory_model import memory
from .request import PlanRequest
from .search import best_way, jobs, longest
from .workload import Degrees, TrainingStep


@dataclass(frozen=True)
class Way:
    """How a batch saves memory.

    Attributes:
        job: the step with these options.
        device: bytes of a rank's device at the peak.
        host: bytes of host memory.
    """

    job: TrainingStep
    device: float
    host: float


def way_of(what: PlanRequest, degrees: Degrees, *, training: bool = True) -> Way:
    """The fastest way to save memory that fits.

    In an evaluation: the first one whose forward fits.

    Raises:
        UspConfigError: none fits; it says what is missing where, and the longest row that fits.
    """
    if training:
        best = best_way(what, degrees)
        it = Way(best.job, best.prediction.memory.total, best.prediction.memory.host)
    else:
        ways = [Way(job, _of_evaluation(what, degrees, job), 0.0) for job in jobs(what, degrees)]
        it = next((way for way in ways if way.device <= what.budget), min(ways, key=lambda way: way.device))
    if it.device <= what.budget and it.host <= what.host_budget:
        return it
    raise _too_long(what, degrees, it)


def _of_evaluation(what: PlanRequest, degrees: Degrees, job: TrainingStep) -> float:
    return sum(memory(what.model, degrees, job).moments["evaluation"].values())


def _too_long(what: PlanRequest, degrees: Degrees, best: Way) -> UspConfigError:
    reach = longest(what, degrees) or longest(what, degrees, degrees.cp)
    missing = [
        f"{side}: {size / 1e9:,.4g} of {there / 1e9:,.4g} GB"
        for side, size, there in (("device", best.device, what.budget), ("host", best.host, what.host_budget))
        if size > there
    ]
    row = f"{what.rows} row{'s' * (what.rows > 1)} of {what.tokens:,} tokens"
    return UspConfigError(
        f"memory: {row} on {degrees.cp} rank(s) need more than there is ({'; '.join(missing)}, with "
        f"{in_words(best.job)})",
        rule="what a step makes on a rank fits into its memory, what is offloaded into its share of the host's",
        remedy=(f"rows of {reach:,} tokens fit in a step; or share" if reach else "share")
        + " a sequence by more ranks (cp_size), or shard weights (FSDP2); memory={...} fixes options by hand",
    )


def told(what: PlanRequest, degrees: Degrees, way: Way) -> str:
    """One line: what was chosen, and why."""
    saved = f", {way.host / 1e9:,.3g} of {what.host_budget / 1e9:,.3g} GB of the host" if way.host else ""
    return (
        f"memory: {what.rows * what.tokens // degrees.cp:,} tokens a rank: {in_words(way.job)}, "
        f"{way.device / 1e9:,.3g} of {what.budget / 1e9:,.3g} GB{saved}"
    )


def in_words(job: TrainingStep) -> str:
    """How layers save memory."""
    if job.layer_chunk_size is None:
        return "whole layers, checkpointed" if job.checkpointing else "whole layers"
    parts = [f"layers in chunks of {job.layer_chunk_size:,}"]
    parts += [f"{job.head_groups} groups of heads"] if job.head_groups > 1 else []
    parts += ["inputs in host memory"] if job.offload else []
    where = "in host memory" if job.offload else "on the device"
    parts += [f"attention of {job.keep_attention} layers kept {where}"] if job.keep_attention else []
    return ", ".join(parts)
