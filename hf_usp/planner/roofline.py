"""Predicted cost of a training step: seconds, exposed communication and memory, from sizes and rates. No torch.

Symbols: S tokens of a row, s = S / (U R) of one rank, n = U s of a ring shard, h query heads, g kv heads,
m = max(g, U), d head width, e bytes of an element, u = s d e. Per rank and layer, causal:

    attention         forward 2 S^2 h d / (U R) FLOPs, backward 5/2 of it: the area of the mask, nothing else
    ulysses           (2 h + 2 m) (1 - 1/U) u bytes forward, the same backward; no computation overlaps with them
    ring              a hop carries 2 m u bytes, backward also the gradients of as many rows; a step computes n^2 / 2 of
                      the area. Exposed is what the transfer takes longer than the step: hidden once
                      n >= e F / (G B), G = h / g, F FLOP/s, B bytes/s. No step overlaps with the last gradients
    merge             every step but the first reads and writes the fp32 output, and in the backward dq
    selected keys     in layers whose queries select them: latents and index keys of all tokens are gathered

Hops are in the order of `shifts` (`sharding/schedule.py`): those between nodes first, those inside the node last.
Times are those of the slowest rank: in zigzag order one receives whole blocks in every step although the mean is 3/4.
Everything that does not depend on the degrees is kept simple on purpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ..sharding.heads import split_heads
from ..sharding.schedule import ring_per_node, shifts
from .hardware import Machine
from .layer_memory import attention_output, head_groups, mlp_tokens
from .memory_model import Memory, memory, param_shards
from .workload import Degrees, Indexer, ModelShape, Selected, TrainingStep, check


@dataclass(frozen=True)
class Attention:
    """Seconds of one layer's attention in one direction on the slowest rank.

    Attributes:
        tiles: in kernels.
        merges: in merges of outputs.
        ulysses: in all-to-alls.
        ring: in transfers of the ring.
        ring_exposed: part of `ring` that no tile overlaps with.
    """

    tiles: float
    merges: float
    ulysses: float
    ring: float
    ring_exposed: float

    @property
    def seconds(self) -> float:
        return self.tiles + self.merges + self.ulysses + self.ring_exposed

    @property
    def exposed(self) -> float:
        """Seconds of communication that no computation overlaps with."""
        return self.ulysses + self.ring_exposed


@dataclass(frozen=True)
class Prediction:
    """A step of one rank: seconds by kind, and bytes.

    Attributes:
        attention: seconds of attention kernels and merges.
        linear: seconds of matrix products outside attention.
        ulysses: seconds of all-to-alls.
        ring: seconds of ring transfers that no tile overlaps with.
        tensor_parallel: seconds of tensor-parallel communication.
        data_parallel: seconds of data-parallel communication that nothing overlaps with.
        offload: seconds of copies to host memory that nothing overlaps with.
        ring_hidden: seconds of ring transfers that tiles overlap with.
        flops: operations of one rank that the model needs, recomputation not counted.
        tokens: tokens of all data-parallel replicas.
        memory: bytes of a rank.
        peak_flops: peak operations a second of one rank.
        host: seconds that the host takes to launch the step; more than those of the device means that it waits.
    """

    attention: float
    linear: float
    ulysses: float
    ring: float
    tensor_parallel: float
    data_parallel: float
    offload: float
    ring_hidden: float
    flops: float
    tokens: int
    memory: Memory
    peak_flops: float
    host: float

    @property
    def seconds(self) -> float:
        return self.attention + self.linear + self.exposed

    @property
    def exposed(self) -> float:
        """Seconds of communication that no computation overlaps with."""
        return self.ulysses + self.ring + self.tensor_parallel + self.data_parallel + self.offload

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all ranks a second."""
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: needed operations over peak operations.

        As the field counts it (PaLM, arXiv 2204.02311, appendix B) and the training report does: three times the
        forward; what a flash backward recomputes does not count.
        """
        return self.flops / self.seconds / self.peak_flops


def predict(
    model: ModelShape,
    degrees: Degrees,
    job: TrainingStep,
    machine: Machine,
    layers: Sequence[tuple[int, Attention, Attention]] | None = None,
) -> Prediction:
    """Seconds and bytes of one training step (one optimizer step without accumulation).

    layers: of `attentions`, which ways to save memory share. Raises `UspConfigError` for sizes that no run has.
    """
    check(model, degrees, job)
    layers = attentions(model, degrees, job, machine) if layers is None else layers
    again = 2 if job.input_alone else 1
    attends = again - (job.keep_attention / model.layers if again == 2 else 0)

    def total(name: str) -> float:
        return sum(count * (attends * getattr(ahead, name) + getattr(back, name)) for count, ahead, back in layers)

    local = job.rows * job.tokens / degrees.cp
    layer_flops = 2 * local * model.active_layer_params * model.layers / degrees.tp
    head_flops = 2 * local * model.hidden * model.vocab / degrees.tp
    linear = _linear(model, degrees, job, machine, local)
    areas = sum(count * mask_area(job.tokens, window) for window, count in model.layer_kinds)
    attention_flops = job.rows * 3 * 4 * areas * model.heads * model.head_dim / (degrees.cp * degrees.tp)
    compute = total("tiles") + total("merges") + linear
    return Prediction(
        attention=total("tiles") + total("merges"),
        linear=linear,
        ulysses=total("ulysses"),
        ring=total("ring_exposed"),
        tensor_parallel=_tensor_parallel(model, degrees, job, machine, local) * (1 + again) / 2,
        data_parallel=max(0.0, _data_parallel(model, degrees, job, machine) - compute),
        offload=_offload(model, degrees, job, machine, compute),
        ring_hidden=total("ring") - total("ring_exposed"),
        flops=3 * (layer_flops + head_flops) + attention_flops,
        tokens=job.rows * job.tokens * degrees.dp_shard * degrees.dp_replicate,
        memory=memory(model, degrees, job),
        peak_flops=machine.flops,
        host=machine.operator * model.layers * host_operators(degrees, job, head_groups(model, degrees, job)),
    )


def _linear(model: ModelShape, degrees: Degrees, job: TrainingStep, machine: Machine, local: float) -> float:
    """Seconds of matrix products outside attention, and of the sums of weight gradients over chunks.

    A layer in chunks computes what comes before attention once for each group of heads in the forward, once in the
    backward and, unless attention's output is kept, once more there; and five times that do not depend on groups.
    """
    whole = min(local, job.layer_chunk_size or local)
    layers, chunked = model.layers / degrees.tp, mlp_tokens(job, whole) < whole
    params: float = (4 if job.input_alone else 3) * model.active_layer_params
    if chunked:  # once more, in the backward
        params += model.active_mlp_params
    if job.layer_chunk_size is not None:
        groups, kept = head_groups(model, degrees, job), job.keep_attention / model.layers
        params += ((3 - kept) * groups + 1) * model.weights_around_attention["before"]
    products = 2 * local * (params * layers + 3 * model.hidden * model.vocab / degrees.tp)
    seconds = products / (machine.flops * machine.matmul)
    # Every chunk adds to gradients in fp32: read, read and written.
    added = model.active_mlp_params * local / mlp_tokens(job, whole) if chunked else 0.0
    if job.layer_chunk_size is not None:
        added += (model.layer_params - (model.mlp_params if chunked else 0)) * local / whole
    return seconds + (8 + job.element) * added * layers / machine.memory_bandwidth


def attentions(
    model: ModelShape, degrees: Degrees, job: TrainingStep, machine: Machine
) -> list[tuple[int, Attention, Attention]]:
    """Number of layers, their attention forward and backward: of full layers, and of those with a window.

    Groups of heads attend one after the other, each with messages of its own.
    """
    groups = head_groups(model, degrees, job) if job.layer_chunk_size is not None else 1
    of_group = replace(model, heads=-(-model.heads // groups), kv_heads=-(-model.kv_heads // groups))

    def of_all(window: int | None, backward: bool) -> Attention:
        it = attention(of_group, degrees, job, machine, window, backward=backward)
        return Attention(**{name: groups * seconds for name, seconds in vars(it).items()})

    return [(count, of_all(window, False), of_all(window, True)) for window, count in model.layer_kinds]


def host_operators(degrees: Degrees, job: TrainingStep, groups: int = 1) -> int:
    """Operators that the host launches for a layer, forward and backward.

    Counted: a Llama's layer without attention, and an attention call on meshes of up to 64 ranks
    (`benchmarks/host_cost.py`; it is not repeated when a checkpointed layer is). A chunk of a layer is the layer, and
    what comes before attention half of it.
    """
    of_ring = 16 + 41 * (degrees.ring - 1) if degrees.ring > 1 else 0
    of_layer, of_attention = 140 + 70, 21 + (82 if degrees.ulysses > 1 else 0) + of_ring
    if job.layer_chunk_size is None:
        return of_layer + (70 if job.checkpointing else 0) + of_attention
    chunks = -(-job.rows * job.tokens // (degrees.cp * job.layer_chunk_size))
    return chunks * (of_layer + 70 + 35 * (3 * groups + 1)) + groups * of_attention


def attention(
    model: ModelShape,
    degrees: Degrees,
    job: TrainingStep,
    machine: Machine,
    window: int | None = None,
    *,
    backward: bool = False,
) -> Attention:
    """One layer's attention in one direction, between heads of local tokens and heads of local tokens."""
    check(model, degrees, job)
    if isinstance(window, Selected) and model.indexer is not None:
        if job.tokens > window:
            return _selecting(model, model.indexer, degrees, job, machine, backward)
        window = None  # every query selects all that it sees
    ulysses, ring, stride = degrees.ulysses, degrees.ring, degrees.tp
    shares = split_heads(-(-model.heads // stride), max(1, model.kv_heads // stride), ulysses)
    busiest = max(shares, key=lambda share: share.num_query)
    heads, kv_heads = busiest.num_query, busiest.num_kv
    rows = job.tokens // ring
    row_bytes = model.head_dim * job.element * job.rows
    payload = (2 * heads + 2 * kv_heads) * rows * row_bytes
    exchange = machine.all_to_all(payload, ulysses, stride)
    if ulysses > 1:  # laid out for the message and back: read and written on either side
        exchange += 4 * payload / machine.memory_bandwidth
    own, other, foreign, hops = _areas(job.tokens, ring, window)
    flops = (10.0 if backward else 4.0) * job.rows * heads * model.head_dim
    length, blocks = min(rows, window or rows), job.rows * heads * rows
    tile = partial(machine.tile, length=length, rows=blocks, kernel=job.kernel, backward=backward)
    tiles = tile(flops * own, causal=True)
    step = tile(flops * other, causal=False) if hops else 0.0
    merge = _merged_bytes(heads, kv_heads, job, backward) * rows * model.head_dim * job.rows / machine.memory_bandwidth
    block = 2 * kv_heads * foreign * row_bytes
    returned = block * job.gradients / job.element if backward else 0.0
    stages = [tiles, *[step + merge] * hops]
    if job.relay:  # always passes on to its neighbour, and the gradients with the keys
        ring_seconds = [machine.hop(block + returned, ulysses * stride, degrees.cp * stride)] * hops
        exposed = sum(max(0.0, seconds - (stages[-1] if job.overlap else 0.0)) for seconds in ring_seconds)
    else:
        of_window = None if window is None or window >= job.tokens else hops
        away = transfers(degrees, machine, block, of_window)
        back = transfers(degrees, machine, returned, of_window) if backward else []
        ring_seconds = away + back
        exposed = exposed_of(stages, away, back) if job.overlap else sum(ring_seconds)
    return Attention(tiles + hops * step, hops * merge, exchange, sum(ring_seconds), exposed)


def _selecting(
    model: ModelShape, indexer: Indexer, degrees: Degrees, job: TrainingStep, machine: Machine, backward: bool
) -> Attention:
    """One layer whose queries select their keys: the same on every mesh of as many ranks.

    Selected keys are copied for every query: read, written and read again; the backward does so twice, and adds their
    gradients in fp32 (read, read and written). Scores of the indexer, forward only, are written, read by
    their activation and by their sum, in fp32. No transfer overlaps with anything.
    """
    queries, scoring = job.rows * job.tokens / degrees.cp, indexer.scoring / indexer.layers
    pairs = job.rows * mask_area(job.tokens, indexer.selected) / degrees.cp
    flops = (2.5 if backward else 1.0) * 2 * pairs * model.heads * indexer.products / degrees.tp
    copied = (2 * 3 * job.element + 12 if backward else 3 * job.element) * queries * indexer.selected * indexer.gathered
    seconds = max(flops / (machine.flops * machine.matmul), copied / machine.memory_bandwidth)
    size: float = job.rows * job.tokens * indexer.gathered * job.element
    if not backward:
        scores = queries * job.tokens * indexer.heads * scoring
        scored = 2 * scores * indexer.width / (machine.flops * machine.matmul)
        seconds += max(scored, 12 * scores / machine.memory_bandwidth)
        size += job.rows * job.tokens * indexer.width * job.element * scoring
    moved = machine.ring_collective(size, degrees.cp, degrees.tp)
    return Attention(seconds, 0.0, 0.0, moved, moved)


def transfers(degrees: Degrees, machine: Machine, size: float, of_window: int | None = None) -> list[float]:
    """Seconds of each of a ring's transfers, in which every rank sends `size` bytes, in the plan's order.

    of_window: neighbours that a window reaches; they are met in the order of ranks. The group is the one that begins
    with a node; one that lies otherwise on the nodes may cross more edges.
    """
    ring, unit, ranks = degrees.ring, degrees.ulysses * degrees.tp, range(0, degrees.cp * degrees.tp, degrees.tp)
    per_node = 1 if of_window is not None else ring_per_node(ranks, degrees.ulysses, machine.ranks_per_node)
    far, near = np.array(shifts(ring, per_node)[:of_window], dtype=np.int64).reshape(-1, 2).T
    # Either way around; of a node that sends whole nodes further, all ranks cross its edge.
    across = np.minimum(far, ring // per_node - far) * per_node
    inside = np.minimum(near, per_node - near)
    distance = np.minimum(np.where(far > 0, across, inside) * unit, machine.ranks_per_node)  # further is not slower
    seconds = np.empty(len(far))
    for leaves, span in ((True, ring * unit), (False, per_node * unit)):
        for steps in np.unique(distance[(far > 0) == leaves]).tolist():
            seconds[((far > 0) == leaves) & (distance == steps)] = machine.hop(size, steps, span)
    return seconds.tolist()


def exposed_of(stages: Sequence[float], away: Sequence[float], back: Sequence[float] = ()) -> float:
    """Seconds that transfers take longer than the steps that they run beside (`attention/ring.py`).

    stages: of the rank's own tiles, then of each step's. away [i]: keys and values that stage i + 1 waits for, under
    way during stage i. back [i]: gradients of stage i + 1, sent during stage i + 2; the last ones are sent
    when nothing is left to compute.
    """
    beside = [*away, 0.0]
    for i, seconds in enumerate(back[:-1]):
        beside[i + 2] += seconds
    late = sum(max(0.0, moving - computing) for moving, computing in zip(beside, stages, strict=True))
    return late + (back[-1] if back else 0.0)


def _merged_bytes(heads: int, kv_heads: int, job: TrainingStep, backward: bool) -> float:
    """Memory traffic of one ring step's merge, per query row and unit of head width.

    Forward: the new output is cast (6 bytes) and blended into the fp32 one in place (12); in separate operators the
    blend alone is difference, product and difference (32). Backward: dq, dk and dv are added to (10).
    """
    if backward:
        return 10 * (heads + 2 * kv_heads)
    return (38 if job.relay else 18) * heads


def mask_area(tokens: int, window: int | None) -> float:
    """(query, key) pairs that a causal mask lets through, with or without a sliding window."""
    seen = min(tokens, window or tokens)
    return seen * (seen + 1) / 2 + (tokens - seen) * seen


def _areas(tokens: int, ring: int, window: int | None) -> tuple[float, float, int, int]:
    """Area of a rank's own tokens, area of each further step, key rows that a step brings, and the steps.

    Full attention is assigned in zigzag order, windows in contiguous order.
    """
    rows = tokens // ring
    total = mask_area(tokens, window) / ring
    if ring == 1:
        return total, 0.0, 0, 0
    if window is None or window >= tokens:
        return total / ring, total / ring, rows, ring - 1
    hops = min(ring - 1, -(-(window - 1) // rows))
    if hops == 0:
        return total, 0.0, 0, 0
    foreign = min(window - 1, rows * hops)
    other = min(total, foreign * (foreign + 1) / 2 if foreign < rows else total / 2)
    return total - other, other / hops, -(-foreign // hops), hops


def _tensor_parallel(model: ModelShape, degrees: Degrees, job: TrainingStep, machine: Machine, local: float) -> float:
    """Two all-reduces of the hidden states a layer and direction; no computation overlaps with them."""
    size = local * model.hidden * job.element
    return 4 * model.layers * 2 * machine.ring_collective(size, degrees.tp)


def _data_parallel(model: ModelShape, degrees: Degrees, job: TrainingStep, machine: Machine) -> float:
    """Parameters gathered twice and gradients scattered once over dp_shard x cp, then summed over the rest."""
    size = model.params * job.element / degrees.tp
    shards = param_shards(degrees, job)
    inside = 3 * machine.ring_collective(size, shards, degrees.tp)
    outside = degrees.ranks // (degrees.tp * shards)
    return inside + 2 * machine.ring_collective(size / shards, outside, degrees.tp * shards)


def _offload(model: ModelShape, degrees: Degrees, job: TrainingStep, machine: Machine, compute: float) -> float:
    """Seconds that copies to host memory and back take longer than all computation; and AdamW on the host.

    States in host memory: weights come twice and gradients go once, in fp32; the step reads and writes 28 bytes a
    parameter.
    """
    local, moved, host = job.rows * job.tokens / degrees.cp, 0.0, 0.0
    if job.input_alone and job.offload:
        often = 2 if job.layer_chunk_size is None else 2 * head_groups(model, degrees, job) + 3
        moved += often * local * model.hidden * job.element * model.layers
    if job.offload and job.layer_chunk_size is not None:  # out and back
        moved += 2 * job.keep_attention * attention_output(model, degrees, job)
    if job.offload_states:
        mine = model.params / (degrees.tp * param_shards(degrees, job))
        moved, host = moved + 12 * mine, 28 * mine
    return max(0.0, moved / machine.host_bandwidth - compute) + host / machine.host_bandwidth
