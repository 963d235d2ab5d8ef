"""Bytes that one rank holds at the peak of a training step, by kind. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from .sizes import Degrees, Job, ModelShape


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak of a step, by kind."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def param_shards(degrees: Degrees, job: Job) -> int:
    """Ranks over which a parameter is spread, tensor parallelism not counted."""
    return degrees.dp_shard * degrees.cp if job.shard_params else 1


def memory(model: ModelShape, degrees: Degrees, job: Job) -> Memory:
    """Bytes of one rank at the peak of a step: what lives through it, and the largest that comes on top.

    A layer keeps, per token: two norms (their input in fp32, normalised and scaled), q, k, v, the output and its
    log-sum-exp, and four tensors of the MLP. Logits: fp32 copy, log-softmax and gradient of the tokens at hand.
    """
    local = job.rows * job.tokens / degrees.cp
    params, shards = model.params / degrees.tp, param_shards(degrees, job)
    element = job.element
    width = model.head_dim * (2 * model.heads + 2 * max(model.kv_heads, degrees.ulysses * degrees.tp)) / degrees.tp
    mlp = 4 * model.intermediate * model.active / degrees.tp
    layer = local * (2 * model.hidden * (4 + 2 * element) + (width + mlp) * element + 4 * model.heads / degrees.tp)
    kept = local * model.hidden * element
    if job.checkpointing:
        activations = layer + kept * (1 if job.offload else model.layers)
    else:
        activations = layer * model.layers
    at_once = local if job.loss_chunk is None else min(local, job.loss_chunk)
    largest = max(model.layer_params, model.hidden * model.vocab) / degrees.tp
    gathered = 2 * largest * element if shards > 1 else 0.0
    return Memory(
        weights=params * element / shards,
        gradients=params * element / shards,
        optimizer=params * job.optimizer / shards,
        activations=activations,
        logits=at_once * model.vocab * 12 / degrees.tp,
        buffers=gathered + _attention_buffers(model, degrees, job, local),
    )


def _attention_buffers(model: ModelShape, degrees: Degrees, job: Job, local: float) -> float:
    """Two blocks of others' keys and values, the fp32 sums, and a message of the head exchange."""
    token = local * model.head_dim / degrees.tp
    kv_heads = max(model.kv_heads, degrees.ulysses * degrees.tp)
    ring = token * (2 * 2 * kv_heads * job.element + 4 * model.heads) if degrees.ring > 1 else 0.0
    exchange = token * 2 * (model.heads + 2 * kv_heads) * job.element if degrees.ulysses > 1 else 0.0
    return ring + exchange
