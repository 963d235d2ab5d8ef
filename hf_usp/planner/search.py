"""Every legal split of the ranks, its best way to save memory, ranked by tokens a second."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from ..errors import UspConfigError
from ..sharding.degrees import even_degrees
from .layer_memory import attention_output, head_groups
from .memory_model import Memory, memory
from .request import MOST_TOKENS, PlanRequest
from .roofline import Attention, Prediction, attentions, mask_area, predict
from .workload import Degrees, TrainingStep

LOSS_CHUNK = 2048
MOST_GROUPS = (1, 2, 4, 8)  # of heads
MOST_FACTOR = 64


@dataclass(frozen=True)
class Candidate:
    """One split of the ranks with its fastest memory options that fit; where none fit, the smallest.

    Attributes:
        degrees: the split.
        job: the step with these options.
        prediction: seconds and bytes.
        budget: bytes that a run may use.
        host_budget: bytes of host memory that it may use.
    """

    degrees: Degrees
    job: TrainingStep
    prediction: Prediction
    budget: float
    host_budget: float

    @property
    def need(self) -> float:
        """Bytes over what there is, on the device or on the host, where more is missing."""
        of = self.prediction.memory
        return max(of.total / self.budget, of.host / self.host_budget)

    @property
    def fits(self) -> bool:
        return self.need <= 1

    @property
    def savings(self) -> str:
        """How memory is saved, in words."""
        return savings(self.job)

    @property
    def limit(self) -> str:
        """The largest part of memory (if it does not fit) or time."""
        it = self.prediction
        if not self.fits and it.memory.total <= self.budget:
            return f"host memory: {it.memory.host / 1e9:.0f} GB"
        if not self.fits:
            kinds = it.memory.at_peak
            largest = max(kinds, key=lambda kind: kinds[kind])
            return f"memory: {largest} {kinds[largest] / 1e9:.0f} GB"
        parts = {
            "attention": it.attention,
            "matrix products": it.linear,
            "ulysses exchange": it.ulysses,
            "ring transfer": it.ring,
            "tensor-parallel sums": it.tensor_parallel,
            "weights and gradients": it.data_parallel,
            "offloading": it.offload,
        }
        largest = max(parts, key=lambda part: parts[part])
        return f"{largest} {parts[largest] / it.seconds:.0%}"


def savings(job: TrainingStep) -> str:
    """How a job saves memory, in words."""
    parts = ["checkpoints offloaded" if job.offload else "checkpointing"] if job.checkpointing else []
    if job.layer_chunk_size:
        parts += [f"layers in chunks of {job.layer_chunk_size}"]
        parts += [f"{job.head_groups} groups of heads"] if job.head_groups > 1 else []
        parts += ["inputs offloaded"] if job.offload else []
        parts += [f"attention of {job.keep_attention} layers kept"] if job.keep_attention else []
    parts += [f"loss in chunks of {job.loss_chunk_size}"] if job.loss_chunk_size else []
    parts += [f"MLPs in chunks of {job.mlp_chunk_size}"] if job.mlp_chunk_size and not job.layer_chunk_size else []
    return ", ".join(parts) or "none"


def ranked(what: PlanRequest) -> list[Candidate]:
    """All splits: those that fit by tokens a second, the fastest first, then the others by memory."""
    found = [best_way(what, degrees) for degrees in splits(what)]
    return sorted(found, key=worth)


def worth(candidate: Candidate) -> tuple[bool, float]:
    """Sort key of candidates, best first; among equals the smallest ulysses degree comes first."""
    it = candidate.prediction
    return not candidate.fits, -it.tokens_per_second if candidate.fits else candidate.need


def best_inside(what: PlanRequest, tp: int, cp: int) -> Candidate:
    """The best split with these sizes whose ulysses groups lie inside a node: what `ulysses_degree=None` means."""
    inside = (d for d in arrangements(what, tp, cp) if d.ulysses == 1 or what.node % (d.ulysses * tp) == 0)
    return min((best_way(what, degrees) for degrees in inside), key=worth)


def splits(what: PlanRequest) -> Iterator[Degrees]:
    """Tensor parallelism inside a node that leaves whole heads; heads at most 5 % uneven; the rest is data parallel."""
    model = what.model
    for tp in _divisors(what.gpus):
        if tp > (what.most_tp or what.node) or what.node % tp or model.heads % tp or model.kv_heads % tp:
            continue
        for cp in _divisors(what.gpus // tp):
            if cp > what.tokens:
                continue
            yield from arrangements(what, tp, cp)


def arrangements(what: PlanRequest, tp: int, cp: int) -> Iterator[Degrees]:
    """Every ulysses x ring of `cp` ranks; heads at most 5 % uneven."""
    for ulysses in even_degrees(cp, max(1, what.model.heads // tp)):
        yield Degrees(ulysses, cp // ulysses, tp, dp_shard=what.gpus // (tp * cp))


def best_way(what: PlanRequest, degrees: Degrees) -> Candidate:
    """The fastest of the ways to save memory that fits, else the one that needs least."""
    every, attended = list(jobs(what, degrees)), dict[int, list[tuple[int, Attention, Attention]]]()
    ways = []
    for job in every:
        if job.head_groups not in attended:
            attended[job.head_groups] = attentions(what.model, degrees, job, what.machine)
        ways.append(_candidate(what, degrees, job, attended[job.head_groups]))
        kept = replace(job, keep_attention=_keepable(what, degrees, ways[-1]))
        if kept != job:
            ways.append(_candidate(what, degrees, kept, attended[job.head_groups]))
    fitting = [way for way in ways if way.fits]
    if fitting:
        return min(fitting, key=lambda way: way.prediction.seconds)
    return min(ways, key=lambda way: way.need)


def _keepable(what: PlanRequest, degrees: Degrees, way: Candidate) -> int:
    """Layers in chunks for whose attention output there is room, where their inputs are kept."""
    if not (what.keep_attention and way.fits and way.job.layer_chunk_size):
        return 0
    of = way.prediction.memory
    room = way.host_budget - of.host if way.job.offload else way.budget - of.total
    return int(min(what.model.layers, room // attention_output(what.model, degrees, way.job)))


def jobs(what: PlanRequest, degrees: Degrees) -> Iterator[TrainingStep]:
    """The ways to save memory, those that save less first. Layers in chunks save with norms and the loss in chunks.

    Those of `memory="auto"`: the loss always in chunks, whole layers with and without checkpointing, layers in chunks.
    """
    sharded = what.gpus > 1 or what.like.offload_states  # FSDP2 on one GPU, too
    plain = replace(what.like, tokens=what.tokens, rows=what.rows)
    if not what.auto:
        plain = replace(plain, shard_params=sharded)
    mlps = (None, what.mlp_chunk_size) if what.mlp_chunk_size else (None,)
    losses = (LOSS_CHUNK,) if what.auto else (None, LOSS_CHUNK)
    kept = ((False, False), (True, False), (True, True)) if what.allow_offload else ((False, False), (True, False))
    for mlp, loss, (checkpointing, offload) in product(mlps, losses, kept[:2] if what.auto else kept):
        yield replace(plain, mlp_chunk_size=mlp, loss_chunk_size=loss, checkpointing=checkpointing, offload=offload)
    if what.layer_chunk_size is None or degrees.cp == 1:
        return
    experts = what.model.experts > 1
    tiled = replace(plain, layer_chunk_size=what.layer_chunk_size, loss_chunk_size=LOSS_CHUNK)
    tiled = replace(tiled, mlp_chunk_size=None if experts else what.layer_chunk_size)
    for groups in MOST_GROUPS:
        grouped = replace(tiled, head_groups=groups)
        if head_groups(what.model, degrees, grouped) == groups:
            yield from (replace(grouped, offload=offload) for offload in (False, True)[: 1 + what.allow_offload])


def _candidate(
    what: PlanRequest, degrees: Degrees, job: TrainingStep, layers: Sequence[tuple[int, Attention, Attention]]
) -> Candidate:
    it = predict(what.model, degrees, job, what.machine, layers)
    if what.documents:
        it = _packed(what, it)
    return Candidate(degrees, job, it, what.budget, what.host_budget)


def _packed(what: PlanRequest, it: Prediction) -> Prediction:
    """The same step when rows are packed from documents: attention shrinks with the area of the mask.

    Transfers are left as they are for whole rows: an upper bound, as most packed rows move less.
    """
    model, kept = what.model, [min(n, what.tokens) for n in what.documents]
    whole = packed = 0.0
    for window, layers in model.layer_kinds:
        packed += layers * sum(mask_area(n, window) for n in kept) / sum(kept) * what.tokens
        whole += layers * mask_area(what.tokens, window)
    share = packed / whole
    of_attention = it.flops - _linear_flops(what, it)
    return replace(it, attention=it.attention * share, flops=it.flops - of_attention * (1 - share))


def _linear_flops(what: PlanRequest, it: Prediction) -> float:
    model = what.model
    per_token = 6 * (model.active_layer_params * model.layers + model.hidden * model.vocab)
    return per_token * it.tokens / what.gpus


def longest(what: PlanRequest, degrees: Degrees, step: int = 1024) -> int:
    """The longest row, in multiples of `step` tokens, whose best way fits this split; 0 where none does."""

    def fits(tokens: int) -> bool:
        found = (memory(what.model, degrees, replace(job, tokens=tokens)) for job in ways)
        return any(it.total <= what.budget and it.host <= what.host_budget for it in found)

    ways = list(jobs(what, degrees))[::-1]  # those that save most first

    if not fits(step):
        return 0
    low, high = 1, 2
    while high < MOST_TOKENS // step and fits(high * step):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


def longest_of_all(what: PlanRequest) -> tuple[int, Degrees]:
    """The longest row over all splits, and its split; that which ranks first for a short row may be none that reaches
    far."""
    return max(((longest(what, degrees), degrees) for degrees in splits(what)), key=lambda found: found[0])


def check_possible(what: PlanRequest, found: list[Candidate]) -> None:
    """Refuse an impossible budget: how much is missing, and the nearest thing that fits."""
    if found[0].fits:
        return
    best = found[0]
    need = best.prediction.memory
    reach, _ = longest_of_all(what)
    ways = [f"rows of {reach:,} tokens fit"] if reach else []
    factor = 2
    while factor <= MOST_FACTOR:
        more = replace(what, gpus=what.gpus * factor)
        if what.gpus * factor >= what.machine.ranks_per_node and what.gpus * factor % what.machine.ranks_per_node:
            break
        if ranked(more)[0].fits:
            ways.append(f"{more.gpus} GPUs hold {what.tokens:,} tokens")
            break
        factor *= 2
    needs = f"{need.total / 1e9:.1f} GB a rank of {what.budget / 1e9:.1f} GB, "
    needs += f"{(need.total - what.budget) / 1e9:.1f} GB too much ({_by_kind(need)})"
    if need.total <= what.budget:
        needs = f"{need.host / 1e9:.1f} GB of host memory a rank of {what.host_budget / 1e9:.1f} GB"
    raise UspConfigError(
        f"{what.tokens:,} tokens on {what.gpus} x {what.machine.name}: the smallest split needs {needs}",
        rule="weights, gradients, optimizer, activations, logits and buffers fit into the memory of one rank, what is "
        "offloaded into its share of the host's",
        remedy="; ".join(ways) or "a smaller model, or LoRA: not even 1,024 tokens fit",
    )


def _by_kind(need: Memory) -> str:
    return ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in need.at_peak.items())


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
