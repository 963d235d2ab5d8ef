"""Bytes that one rank holds in a training step, by kind, and at its peak. No torch.

Kinds do not all have their largest size at once: without accumulation gradients appear while activations go. So a step
is looked at in some moments, and its peak is that of the largest:

    loss          all kept activations and the logits; gradients of earlier steps, where they are accumulated
    top layer     its backward: all kept activations, what one layer's backward makes, the head's gradient
    bottom layer  its backward: almost all gradients, one layer's activations
    gradients     all of them, and the one that is about to be added

A layer's backward has two moments, as what its MLP makes is gone when its attention runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from .workload import Degrees, ModelShape, TrainingStep

KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank in a step; the properties give the largest of each kind.

    `logits` includes what a loss in chunks holds for the gradient of the head.

    Attributes:
        moments: moment -> kind -> bytes.
    """

    moments: dict[str, dict[str, float]]

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


def memory(model: ModelShape, degrees: Degrees, job: TrainingStep) -> Memory:
    """Bytes of one rank in the moments of a step.

    A layer keeps, per token: two norms (their input in fp32, normalised and scaled), q, k, v, the output and its
    log-sum-exp, and four tensors of the MLP; its backward makes three of the MLP's width and two of the hidden one.
    An MLP in chunks keeps none of the four: its backward makes all seven for the tokens of a chunk, and holds the
    gradients of its weights, summed in fp32, beside what a chunk adds to them.
    Logits: log-softmax of the tokens at hand in fp32 and two gradients. In chunks the logits themselves, too, and the
    gradient of the head, summed in fp32, and what a chunk adds to it where that is in a lower precision. Under tensor
    parallelism plans of Transformers gather full logits on every rank; in chunks they stay apart. Meanwhile the last
    norm keeps what each norm does, and a loss in chunks collects the gradient of its output.
    """
    local = job.rows * job.tokens / degrees.cp
    shards, element = param_shards(degrees, job), job.element
    spread = element / (degrees.tp * shards)
    mlp = model.intermediate * model.active / degrees.tp
    width = model.head_dim * (2 * model.heads + 2 * max(model.kv_heads, degrees.ulysses * degrees.tp)) / degrees.tp
    layer = local * (2 * model.hidden * (4 + 2 * element) + width * element + 4 * model.heads / degrees.tp)
    at_once = mlp_tokens(job, local)
    layer += 4 * at_once * mlp * element if at_once == local else 0.0
    backward = (2 * local * model.hidden + (3 if at_once == local else 7) * at_once * mlp) * element
    summed = model.active_mlp_params * (4 + element) / degrees.tp if at_once < local else 0.0
    kept = local * model.hidden * element if job.checkpointing else layer
    again = layer if job.checkpointing else 0.0
    all_kept = kept if job.offload and job.checkpointing else kept * model.layers
    head = model.hidden * model.vocab
    logits = 12 * local * model.vocab
    if job.loss_chunk_size is not None:
        logits = min(local, job.loss_chunk_size) * model.vocab * (12 + element) / degrees.tp
        logits += head * (4 + (element if element < 4 else 0)) / degrees.tp
    last_norm = local * model.hidden * (4 + (2 if job.loss_chunk_size is None else 3) * element)
    whole = max(model.layer_params, head) / degrees.tp * element if shards > 1 else 0.0
    gathered, scattered = 2 * whole, 3 * whole  # one at work, one that comes; in the backward gradients that go
    attention = _attention_buffers(model, degrees, job, local)
    every, top = model.params * spread, head * spread
    above = top + (model.layers - 1) * model.layer_params * spread

    def moment(gradients: float, activations: float, logits: float, buffers: float) -> dict[str, float]:
        lasting = {"weights": model.params * spread, "optimizer": model.params * job.optimizer / (degrees.tp * shards)}
        made = {"activations": activations, "logits": logits, "buffers": buffers}
        return {kind: {**lasting, "gradients": gradients, **made}[kind] for kind in KINDS}

    earlier = every if job.accumulate else 0.0
    added = head * spread if job.accumulate else 0.0
    return Memory(
        {
            "loss": moment(earlier, all_kept + last_norm, logits, gathered),
            "top layer, MLP": moment(max(earlier, top) + summed, all_kept + again + backward, 0.0, scattered),
            "top layer, attention": moment(max(earlier, top), all_kept + again, 0.0, scattered + attention),
            "bottom layer, MLP": moment(max(earlier, above) + summed, kept + again + backward, 0.0, scattered),
            "bottom layer, attention": moment(max(earlier, above), kept + again, 0.0, scattered + attention),
            "gradients": moment(every + added, 0.0, 0.0, scattered),
        }
    )


def _attention_buffers(model: ModelShape, degrees: Degrees, job: TrainingStep, local: float) -> float:
    """Two blocks of others' keys and values, the fp32 sums, and a message of the head exchange."""
    token = local * model.head_dim / degrees.tp
    kv_heads = max(model.kv_heads, degrees.ulysses * degrees.tp)
    ring = token * (2 * 2 * kv_heads * job.element + 4 * model.heads) if degrees.ring > 1 else 0.0
    exchange = token * 2 * (model.heads + 2 * kv_heads) * job.element if degrees.ulysses > 1 else 0.0
    return ring + exchange
