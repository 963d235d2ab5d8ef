"""The way of one batch to save memory, for `memory="auto"`: the fastest that fits, as `hf-usp plan --auto` takes it.

Decided from what all ranks of a mesh know equally: the model's config, sizes, and memory that they have agreed on.
"""

from __future__ import annotations

from dataclasses import replace

from ..errors import UspConfigError
from .memory_model import memory
from .request import PlanRequest
from .search import Candidate, best_way, jobs, longest
from .workload import Degrees, TrainingStep


def way_of(what: PlanRequest, degrees: Degrees, *, training: bool = True) -> Candidate:
    """The fastest way to save memory that fits.

    In an evaluation: the first one whose forward fits.

    Raises:
        UspConfigError: none fits; it says what is missing where, and the longest row that fits.
    """
    if not training:
        for job in jobs(what, degrees):
            if sum(memory(what.model, degrees, job).moments["evaluation"].values()) <= what.budget:
                return replace(best_way(what, degrees), job=job)
    best = best_way(what, degrees)
    if training and best.fits:
        return best
    raise _too_long(what, degrees, best)


def _too_long(what: PlanRequest, degrees: Degrees, best: Candidate) -> UspConfigError:
    need, reach = best.prediction.memory, longest(what, degrees) or longest(what, degrees, degrees.cp)
    missing = [
        f"{side}: {size / 1e9:,.4g} of {there / 1e9:,.4g} GB"
        for side, size, there in (("device", need.total, what.budget), ("host", need.host, what.host_budget))
        if size > there
    ]
    row = f"{what.rows} row{'s' * (what.rows > 1)} of {what.tokens:,} tokens"
    return UspConfigError(
        f"memory: {row} on {degrees.cp} ranks need more than there is ({'; '.join(missing)}, with {best.savings})",
        rule="what a step makes on a rank fits into its memory, what is offloaded into its share of the host's",
        remedy=(f"rows of {reach:,} tokens fit; or share" if reach else "share")
        + " a sequence by more ranks (cp_size), or shard weights (FSDP2); memory={...} fixes options by hand",
    )


def told(what: PlanRequest, degrees: Degrees, way: Candidate) -> str:
    """One line: what was chosen, and why."""
    job, need = way.job, way.prediction.memory
    saved = f", {need.host / 1e9:,.4g} of {what.host_budget / 1e9:,.4g} GB of the host" if need.host else ""
    return (
        f"memory: {what.rows * what.tokens // degrees.cp:,} tokens a rank: {in_words(job)}, "
        f"{need.total / 1e9:,.3g} of {what.budget / 1e9:,.3g} GB{saved}"
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
