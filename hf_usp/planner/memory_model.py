"""Bytes that one rank holds in a training step, by kind, and at its peak. No torch.

Kinds do not all have their largest size at once: without accumulation gradients appear while activations go. So a step
is looked at in some moments, and its peak is that of the largest:

    loss          all kept activations and the logits; gradients of earlier steps, where they are accumulated
    final norm    its backward: all kept activations, the head's gradient
    top layer     its backward: all kept activations, what one layer's backward makes, the head's gradient
    second layer  the last but one in the backward: what is offloaded of the bottom layer is on its way back
    bottom layer  its backward: almost all gradients, one layer's activations
    gradients     all of them, and the one that is about to be added
    evaluation    a forward without gradients

Of one layer: `layer_memory.py`. `hf-usp plan --simulate` runs the real program at real
sizes, and these formulas are tested against it.
"""

from __future__ import annotations

from dataclasses import dataclass

from .layer_memory import TiledLayer, WholeLayer, attention_output, tiled_layer, whole_layer
from .workload import Degrees, ModelShape, TrainingStep

KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank in a step; the properties give the largest of each kind.

    `logits` includes what a loss in chunks holds for the gradient of the head.

    Attributes:
        moments: moment -> kind -> bytes.
        host: bytes of host memory.
    """

    moments: dict[str, dict[str, float]]
    host: float = 0.0

    @property
    def kinds(self) -> dict[str, float]:
        """Each kind at its largest; together more than there ever is."""
        return {kind: max(it[kind] for it in self.moments.values()) for kind in KINDS}

    @property
    def peak(self) -> str:
        """The moment with the most bytes."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def at_peak(self) -> dict[str, float]:
        """Bytes of each kind in that moment."""
        return self.moments[self.peak]

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return sum(self.at_peak.values())

    def __getattr__(self, kind: str) -> float:
        if kind not in KINDS:
            raise AttributeError(kind)
        return self.kinds[kind]


def param_shards(degrees: Degrees, job: TrainingStep) -> int:
    """Ranks over which a parameter is spread, tensor parallelism not counted."""
    return degrees.dp_shard * degrees.cp if job.shard_params else 1


@dataclass(frozen=True)
class _States:
    """Bytes of one rank that last from step to step.

    Attributes:
        weights: all weights.
        optimizer: state of the optimizer.
        gradient: of one parameter's gradient, once it is spread.
        host: the same states, where they are in host memory.
    """

    weights: float
    optimizer: float
    gradient: float
    host: float = 0.0

    @classmethod
    def of(cls, model: ModelShape, degrees: Degrees, job: TrainingStep) -> _States:
        shards = param_shards(degrees, job)
        copies = job.shard_params and job.element < 4 and job.optimizer == 12
        each = 1 / (degrees.tp * shards)
        weight, optimizer = (4, 8 * job.trained) if copies else (job.element, job.optimizer * job.trained)
        states = model.params * each * (weight + optimizer)
        if job.offload_states:
            return cls(0.0, 0.0, 0.0, states + model.params * each * weight)
        return cls(model.params * each * weight, model.params * each * optimizer, each * weight * job.trained)


def _logits(model: ModelShape, degrees: Degrees, job: TrainingStep) -> float:
    """Log-softmax of the tokens at hand in fp32 and two gradients.

    In chunks the logits themselves, too, and the gradient of the head, summed in fp32, and what a chunk adds to it
    where that is in a lower precision. Under tensor parallelism plans of Transformers gather full logits on every
    rank; in chunks they stay apart.
    """
    local, element = job.rows * job.tokens / degrees.cp, job.element
    if job.loss_chunk_size is None:
        return 12 * local * model.vocab
    of_chunk, head = min(local, job.loss_chunk_size) * model.vocab, model.hidden * model.vocab
    added = head * element + 2 * of_chunk * element if element < 4 else 0.0
    return (4 * head + max(of_chunk * (12 + element), added)) / degrees.tp


def memory(model: ModelShape, degrees: Degrees, job: TrainingStep) -> Memory:
    """Bytes of one rank in the moments of a step.

    Weights are in `element` bytes. With 12 bytes of optimizer state, 2-byte weights and FSDP2 they are the fp32 copies
    that Accelerate keeps and gathers in bf16, and gradients are in fp32, too.
    """
    part = (whole_layer if job.layer_chunk_size is None else tiled_layer)(model, degrees, job)
    states = _States.of(model, degrees, job)
    gathered = job.element / degrees.tp if job.offload_states or param_shards(degrees, job) > 1 else 0.0
    layer, head = model.layer_params * gathered, model.hidden * model.vocab * gathered
    of_head, every = model.hidden * model.vocab * states.gradient, model.params * states.gradient
    earlier = every if job.accumulate else 0.0
    away = job.input_alone and job.offload
    attended = job.keep_attention * attention_output(model, degrees, job)
    all_kept = 0.0 if away else part.kept(job) * model.layers + attended

    at_head = part.norm + (0.0 if job.loss_chunk_size is None else part.hidden)  # in chunks the gradient, too
    final = max(part.norm_back, 6 / 5 * part.norm_back if job.element == 4 and part.mlp else 0.0)  # no residual's

    def moment(gradients: float, activations: float, buffers: float, logits: float = 0.0) -> dict[str, float]:
        sizes = (states.weights, max(earlier, gradients), states.optimizer, activations + part.always, logits, buffers)
        return dict(zip(KINDS, sizes, strict=True))

    moments = {
        "loss": moment(0.0, all_kept + at_head, head, _logits(model, degrees, job)),
        "final norm": moment(0.0 if head else of_head, all_kept + final, 2 * head),
        "gradients": moment(every + (of_head if job.accumulate else 0.0), part.hidden, 3 * head),
        "evaluation": moment(0.0, part.hidden + part.forward(), 2 * layer),
    }
    if job.layer_chunk_size is not None:
        moments["forward"] = moment(0.0, max(all_kept - part.hidden, part.hidden) + part.forward(), 2 * layer)
    for place, (others, gradients, moving) in _places(model, degrees, part, job, states, layer, head).items():
        for name, (activations, of_weights) in part.backward().items():
            moments[f"{place}, {name}"] = moment(gradients + of_weights, others + activations, moving)
    host = model.layers * part.hidden if away else 0.0
    return Memory(moments, states.host + host + (attended if away else 0.0))


def _places(
    model: ModelShape,
    degrees: Degrees,
    part: WholeLayer | TiledLayer,
    job: TrainingStep,
    states: _States,
    layer: float,
    head: float,
) -> dict[str, tuple[float, float, float]]:
    """Place of a layer -> what is kept of others, gradients that are there, parameters and gradients under way.

    A layer that computes is gathered, the next one and the gradients of the one before are under way; beside the top
    layer these are the head's (beside the next one a layer's), beside the bottom one the embedding's.
    """
    kept, below = part.kept(job), model.layers - 1
    of_layer, of_head = (size * states.gradient for size in (model.layer_params, model.hidden * model.vocab))
    embedding = 0.0 if model.tied else head
    places = {
        "top layer": (kept * below, of_head, 2 * layer + max(head, layer if below > 1 else 0.0)),
        "bottom layer": (0.0, of_head + below * of_layer, 2 * layer + embedding),
    }
    if job.layer_chunk_size is not None:  # nothing of another layer comes back before it computes
        attended = min(job.keep_attention, below) * attention_output(model, degrees, job)
        others = 0.0 if job.offload else kept * below + attended
        return {**places, "top layer": (others, *places["top layer"][1:])}
    if job.checkpointing and job.offload:
        places["top layer"] = (min(kept, kept * below), *places["top layer"][1:])
        if below > 1:
            places["second layer"] = (kept, of_head + (below - 1) * of_layer, 3 * layer)
    return places
