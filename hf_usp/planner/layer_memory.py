"""Bytes of one layer on one rank: what it keeps, and what its forward and backward make. No torch.

A layer's backward has three moments: that of its MLP; of the norm before the MLP, whose temporaries are in fp32; of
attention. MLPs in chunks have norms in chunks with them. A layer in chunks has four: attention, computed again; the
backward of what comes after it; its own; that of what comes before it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..sharding.heads import HeadShare, group_heads
from .hardware import WORKSPACES
from .workload import Degrees, ModelShape, TrainingStep

LENGTHWISE = 32  # bytes a token of ids, labels and positions, in int64


def mlp_tokens(job: TrainingStep, local: float) -> float:
    """Tokens, of a rank's `local` ones, for which what an MLP computes exists at once."""
    return local if job.mlp_chunk_size is None else min(local, job.mlp_chunk_size)


@dataclass(frozen=True)
class WholeLayer:
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
        of_mlp: gradients of an MLP's weights.
        summed: the same while they are made; in chunks they are summed in fp32.
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
    of_mlp: float
    summed: float
    always: float

    def kept(self, job: TrainingStep) -> float:
        """Of a layer, until its backward."""
        return self.hidden if job.input_alone else 2 * self.norm + self.attention + self.mlp

    def forward(self) -> float:
        """Of a layer's forward without gradients: its input and output."""
        return 2 * self.hidden + max(self.ahead, self.mlp_ahead)

    def backward(self) -> dict[str, tuple[float, float]]:
        """Moments of a layer's backward: what is alive of it, and the gradients of its weights.

        The gradient of its output is there, and its first norm.
        """
        around = self.hidden + self.norm + self.of_input
        return {
            "MLP": (around + self.attention + self.norm + self.mlp_back, self.summed),
            "norm": (around + self.attention + self.norm_back, self.of_mlp),
            "attention": (around + self.core, self.of_mlp),
        }


@dataclass(frozen=True)
class TiledLayer:
    """Bytes of one layer in chunks, on one rank.

    Attributes:
        hidden: a hidden state.
        norm: what the final norm keeps.
        norm_back: of its backward.
        mlp: what an MLP outside of chunks would keep.
        ahead: of a layer's forward, beside its input.
        always: rotary tables, ids, labels, positions.
        moments: of the backward: bytes, and those of weights' gradients.
    """

    hidden: float
    norm: float
    norm_back: float
    mlp: float
    ahead: float
    always: float
    moments: dict[str, tuple[float, float]]

    def kept(self, job: TrainingStep) -> float:
        """Of a layer, until its backward."""
        return self.hidden

    def forward(self) -> float:
        """Of a layer's forward: its input, and its output or what attention takes."""
        return self.hidden + self.ahead

    def backward(self) -> dict[str, tuple[float, float]]:
        """Moments of a layer's backward: what is alive of it, and the gradients of its weights."""
        return self.moments


def head_groups(model: ModelShape, degrees: Degrees, job: TrainingStep) -> int:
    """Groups of heads that attend one after the other: as many as were asked for, or as there can be."""
    return len(_groups(model, degrees, job))


def attention_output(model: ModelShape, degrees: Degrees, job: TrainingStep) -> float:
    """Bytes of one layer's attention output and log-sum-exp on one rank."""
    local = job.rows * job.tokens / degrees.cp
    return local * model.heads * (model.head_dim * job.element + 4) / degrees.tp


def _groups(model: ModelShape, degrees: Degrees, job: TrainingStep) -> tuple[HeadShare, ...]:
    heads, kv_heads = -(-model.heads // degrees.tp), max(1, model.kv_heads // degrees.tp)
    return group_heads(heads, kv_heads, job.head_groups, degrees.ulysses)


def whole_layer(model: ModelShape, degrees: Degrees, job: TrainingStep) -> WholeLayer:
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
    return WholeLayer(
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
        of_mlp=model.mlp_params * element / degrees.tp,
        summed=0.0 if whole else model.active_mlp_params * 4 / degrees.tp,
        always=local * (2 * model.head_dim * element + LENGTHWISE),
    )


def tiled_layer(model: ModelShape, degrees: Degrees, job: TrainingStep) -> TiledLayer:
    """Queries, keys, values and their gradients are there for a group of heads, attention's output for all of them.

    The gradient of a layer's input takes the place of that of its output. A chunk is a layer with all that its graph
    keeps, beside the gradients of the weights that it adds to their sums. Attention's output that is kept in host
    memory comes back in chunks, then in groups, the next one under way.
    """
    whole, local, element = whole_layer(model, degrees, job), job.rows * job.tokens / degrees.cp, job.element
    groups = _groups(model, degrees, job)
    largest = max(groups, key=lambda group: (group.num_query, group.num_kv))
    heads, kv_heads = largest.num_query * degrees.tp, largest.num_kv * degrees.tp
    _, core, ahead = _attention(replace(model, heads=heads, kv_heads=kv_heads, head_norms=False), degrees, job, local)
    of_head = local * model.head_dim * element / degrees.tp
    q, lse = of_head * model.heads, 4 * local * model.heads / degrees.tp
    kv = of_head * 2 * sum(group.num_kv for group in groups) * degrees.tp
    mine = heads / model.heads
    others = 1 - mine
    around = whole.hidden if job.offload else 2 * whole.hidden

    chunk = replace(job, layer_chunk_size=None, rows=1, tokens=round(min(local, job.layer_chunk_size or local)))
    part = whole_layer(replace(model, head_norms=False), Degrees(tp=degrees.tp), chunk)
    weights = {name: params / degrees.tp for name, params in model.weights_around_attention.items()}
    mlp_grads = model.mlp_params * element / degrees.tp
    inner = part.mlp / 4  # of an MLP that is whole inside its chunk
    mlp_back = max(part.mlp_back + part.hidden + mlp_grads / 3, 4 * inner + mlp_grads) if inner else part.mlp_back
    after = part.hidden + part.norm + mlp_back
    before = part.attention + part.norm_back
    if model.head_norms:  # the backward of the queries' norm
        q_chunk, kv_chunk = q * chunk.tokens / local, kv * chunk.tokens / local
        before = max(before, (24 / element + 1) * q_chunk + 2 * kv_chunk + part.norm)
    collected = mine * (q + kv) + part.ahead + 2 * part.hidden  # of a group, the last chunk of it at work
    ahead, core = max(ahead, collected), max(core, mine * (2 * q + lse) + collected)
    if job.offload:  # chunks of the layer's input: one is read, the next one comes
        after, before = after + 2 * part.hidden, before + 2 * part.hidden
    again = others * (q + lse) + ahead
    beside = others * max(2 * q + lse, q + kv)  # of the groups that are not at work
    outs = q + lse
    if job.offload and job.keep_attention == model.layers:
        again, outs = 0.0, 2 * chunk.tokens / local * (q + lse)
        beside = others * (q + kv) + mine * max(0.0, q + lse - kv if len(groups) > 1 else 0.0)
    return TiledLayer(
        hidden=whole.hidden,
        norm=whole.norm,
        norm_back=whole.norm_back,
        mlp=whole.mlp,
        ahead=max(others * (q + lse) + ahead, q + lse + whole.hidden + part.attention + part.mlp_ahead),
        always=whole.always,
        moments={
            "attention again": (around + again, 0.0),
            "after attention": (around + q + outs + after, 4 * weights["after"]),
            "attention": (around + beside + core, 4 * weights["after"]),
            "before attention": (
                around + q + kv + before,
                4 * weights["after"] + (4 + element) * weights["before"],
            ),
        },
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
        back = q + kv + max(q + kv, 0.5 * q + 2 * kv) + tile
    else:
        back = fp32 * (q + kv) + q + 4 * kv + tile
    if degrees.ring > 1:
        ahead = fp32 * 1.5 * q + 0.5 * q + 2.5 * kv
    core = at_hand + q + back
    if of_norm > 1 and model.head_norms:  # the backward of the queries' norm
        core = max(core, 6 * fp32 * q + 2.5 * kv)
    rope = 4 * q + kv if job.layer_chunk_size is None else 0.0
    if degrees.ulysses > 1:
        core, ahead = max(core, kept + 2 * q), max(ahead + q + kv, 3 * q)
    return kept, core, max(rope, q + kv + ahead)
