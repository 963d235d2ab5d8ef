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

A layer's backward has three moments: that of its MLP; of the norm before the MLP, whose temporaries are in fp32; of
attention. MLPs in chunks have norms in chunks with them. `hf-usp plan --simulate` runs the real program at real sizes,
and these formulas are tested against it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .hardware import WORKSPACES
from .workload import Degrees, ModelShape, TrainingStep

KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
LENGTHWISE = 32  # bytes a token of ids, labels and positions, in int64


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


def mlp_tokens(job: TrainingStep, local: float) -> float:
    """Tokens, of a rank's `local` ones, for which what an MLP computes exists at once."""
    return local if job.mlp_chunk_size is None else min(local, job.mlp_chunk_size)


@dataclass(frozen=True)
class _Parts:
    """Bytes of the tensors of one layer on one rank.

    Attributes:
        hidden: a hidden state.
        norm: what a norm keeps: its input in fp32, normalised, scaled; in chunks its input and output.
        norm_back: of its backward.
        of_input: of the input of a checkpointed layer, beside what its first norm keeps.
        attention: what attention keeps: queries, keys, values, output, log-sum-exp; under ulysses the message of heads
            that arrived, the output by heads and by tokens.
        core: of attention's backward, what is kept included.
        ahead: of attention's forward, queries, keys and values included.
        mlp: what an MLP keeps.
        mlp_back: of an MLP's backward.
        mlp_ahead: of an MLP's forward without gradients.
        summed: gradients of an MLP's weights, summed in fp32 over chunks.
        always: rotary tables, ids, labels, positions.
    """

    hidden: float
    norm: float
    norm_back: float
    of_input: float
    attention: float
    core: float
    ahead: float
    mlp: float
    mlp_back: float
    mlp_ahead: float
    summed: float
    always: float

    def kept(self, job: TrainingStep) -> float:
        """Of a layer, until its backward."""
        return self.hidden if job.checkpointing else 2 * self.norm + self.attention + self.mlp

    def backward(self) -> dict[str, tuple[float, bool]]:
        """Moments of a layer's backward: what is alive of it, and whether its MLP's gradients are being summed.

        The gradient of its output is there, and its first norm.
        """
        around = self.hidden + self.norm + self.of_input
        return {
            "MLP": (around + self.attention + self.norm + self.mlp_back, True),
            "norm": (around + self.attention + self.norm_back, False),
            "attention": (around + self.core, False),
        }


def _parts(model: ModelShape, degrees: Degrees, job: TrainingStep) -> _Parts:
    """A norm's backward makes five fp32 tensors beside its input in fp32; in a layer in fp32 one of them is the
    residual's gradient already. In chunks these are of a chunk, beside its input and the gradients of both
    sides. An MLP keeps four tensors of its width and its backward has six; in chunks it keeps none and has six of a
    chunk, or four and the gradients of all weights that a chunk adds, beside the gradient of its input.

    Nothing but the first norm needs the input of a checkpointed layer, but where it is not offloaded the checkpoint
    holds it as well.
    """
    local, element = job.rows * job.tokens / degrees.cp, job.element
    hidden, wide = local * model.hidden * element, local * model.hidden * 4
    inner = local * model.intermediate * model.active * element / degrees.tp
    share = mlp_tokens(job, local) / local
    whole, added = share == 1, model.active_mlp_params * element / degrees.tp
    of_chunk = max(6 * inner * share + hidden * share + added / 3, 4 * inner * share + added)
    attention, core, ahead = _attention(model, degrees, job, local)
    return _Parts(
        hidden=hidden,
        norm=wide + 2 * hidden if whole else 2 * hidden,
        norm_back=(6 if element < 4 else 5) * wide if whole else 3 * hidden + share * (6 * wide + hidden),
        of_input=hidden if job.checkpointing and not job.offload and whole and element < 4 else 0.0,
        attention=attention,
        core=core,
        ahead=ahead,
        mlp=4 * inner if whole else 0.0,
        mlp_back=6 * inner if whole else hidden + of_chunk,
        mlp_ahead=3 * inner * share + hidden,
        summed=0.0 if whole else model.active_mlp_params * 4 / degrees.tp,
        always=local * (2 * model.head_dim * element + LENGTHWISE),
    )


def _attention(model: ModelShape, degrees: Degrees, job: TrainingStep, local: float) -> tuple[float, float, float]:
    """Bytes that attention keeps; its backward and its forward, the kept bytes and the output's gradient included.

    A ring of three and more sums outputs and gradients in fp32. It holds two blocks of keys and values, the gradients
    of two, and the results of a tile; a kernel's workspace is that of a tile: all queries and half of the keys, or
    half of the queries and all keys.
    """
    token = local * model.head_dim * job.element / degrees.tp
    q, kv = token * model.heads, 2 * token * max(model.kv_heads, degrees.ulysses * degrees.tp)
    lse, fp32 = 4 * local * model.heads / degrees.tp, max(1.0, 4 / job.element)
    shared_by, workspace = model.heads / max(model.kv_heads, degrees.ulysses * degrees.tp), WORKSPACES[job.kernel]

    def work(of_q: float, of_kv: float) -> float:
        return workspace.bytes(of_q * q / job.element, of_kv * kv / job.element, shared_by)

    # Of norms of heads: the input in fp32 and the normalised values, in chunks the input.
    of_norm = 4 / job.element + 1 if mlp_tokens(job, local) == local else 1.0
    norms = of_norm * (q + kv / 2) if model.head_norms else 0.0
    kept = (2 * q if degrees.ulysses == 1 else 3 * q) + kv + lse + norms
    at_hand = 2 * q + kv + lse + norms  # attention's own: by heads
    tile = max(work(1, 0.5), work(0.5, 1))
    if degrees.ring == 1:
        back, ahead = q + kv + work(1, 1), q
    elif degrees.ring == 2:
        back, ahead = q + kv + max(q + kv, 0.5 * q + 2 * kv) + tile, 1.5 * q + 1.5 * kv
    else:
        back, ahead = fp32 * (q + kv) + q + 4 * kv + tile, fp32 * 1.5 * q + 0.5 * q + 2.5 * kv
    core = at_hand + q + back
    if of_norm > 1 and model.head_norms:  # the backward of the queries' norm
        core = max(core, 6 * fp32 * q + 2.5 * kv)
    rope = 4 * q + kv
    if degrees.ulysses > 1:
        core, ahead = max(core, kept + 2 * q), max(ahead + q + kv, 3 * q)
    return kept, core, max(rope, q + kv + ahead)


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
        weight, optimizer = (4, 8) if copies else (job.element, job.optimizer)
        states = model.params * each * (weight + optimizer)
        if job.offload_states:
            return cls(0.0, 0.0, 0.0, states + model.params * each * weight)
        return cls(model.params * each * weight, model.params * each * optimizer, each * weight)


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
    part, states = _parts(model, degrees, job), _States.of(model, degrees, job)
    gathered = job.element / degrees.tp if job.offload_states or param_shards(degrees, job) > 1 else 0.0
    layer, head = model.layer_params * gathered, model.hidden * model.vocab * gathered
    of_head, every = model.hidden * model.vocab * states.gradient, model.params * states.gradient
    earlier = every if job.accumulate else 0.0
    away = job.checkpointing and job.offload
    all_kept = 0.0 if away else part.kept(job) * model.layers

    at_head = part.norm + (0.0 if job.loss_chunk_size is None else part.hidden)  # in chunks the gradient, too
    final = max(part.norm_back, 6 / 5 * part.norm_back if job.element == 4 and part.mlp else 0.0)  # no residual's

    def moment(gradients: float, activations: float, buffers: float, logits: float = 0.0) -> dict[str, float]:
        sizes = (states.weights, max(earlier, gradients), states.optimizer, activations + part.always, logits, buffers)
        return dict(zip(KINDS, sizes, strict=True))

    moments = {
        "loss": moment(0.0, all_kept + at_head, head, _logits(model, degrees, job)),
        "final norm": moment(0.0 if head else of_head, all_kept + final, 2 * head),
        "gradients": moment(every + (of_head if job.accumulate else 0.0), part.hidden, 3 * head),
        "evaluation": moment(0.0, 2 * part.hidden + max(part.ahead, part.mlp_ahead) + part.hidden, 2 * layer),
    }
    for place, (others, gradients, moving) in _places(model, part, job, states, layer, head).items():
        for name, (activations, of_mlp) in part.backward().items():
            summed = part.summed if of_mlp else model.mlp_params * job.element / degrees.tp
            moments[f"{place}, {name}"] = moment(gradients + summed, others + activations, moving)
    return Memory(moments, states.host + (model.layers * _pinned(part.hidden) if away else 0.0))


def _places(
    model: ModelShape, part: _Parts, job: TrainingStep, states: _States, layer: float, head: float
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
    if job.checkpointing and job.offload:
        places["top layer"] = (min(kept, kept * below), *places["top layer"][1:])
        if below > 1:
            places["second layer"] = (kept, of_head + (below - 1) * of_layer, 3 * layer)
    return places


def _pinned(size: float) -> float:
    """Bytes of a buffer in pinned memory: torch rounds it up to a power of two."""
    return 2.0 ** math.ceil(math.log2(size))
