"""Sizes of the model, of the training step and of the mesh. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import UspConfigError
from ..sharding.degrees import check_degrees
from ..utils.validation import check_positive_int


class Selected(int):
    """The most keys that a query attends to, as a window is; but it selects them among all that it sees."""


@dataclass(frozen=True)
class Indexer:
    """How the queries of some layers select their keys (`docs/indexed-attention.md`).

    Attributes:
        layers: layers that attend to a selection.
        scoring: those that make one; the others take it over.
        selected: keys that a query selects at most.
        heads: index heads.
        width: of an index key.
        gathered: numbers of a token that such a layer gathers: its latent, or its keys and values.
        products: numbers that a query head multiplies for a key, scores and values together.
    """

    layers: int
    scoring: int
    selected: int
    heads: int
    width: int
    gathered: int
    products: int


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-like decoder; biases and norms are not counted.

    Attributes:
        layers: number of layers.
        hidden: width of a hidden state.
        intermediate: width inside an MLP.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        vocab: entries of the vocabulary.
        tied: whether embeddings and LM head share weights.
        experts: MLPs of a layer; 1: no experts.
        active: MLPs that a token uses.
        window: keys that a sliding layer sees; None: no window.
        sliding_layers: layers that have the window.
        head_norms: whether queries and keys are normalised, head by head.
        indexer: how the queries of some layers select their keys; None: no layer does.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    experts: int = 1
    active: int = 1
    window: int | None = None
    sliding_layers: int = 0
    head_norms: bool = False
    indexer: Indexer | None = None

    @property
    def layer_kinds(self) -> tuple[tuple[int | None, int], ...]:
        """Window and number of layers: of those that see all keys, of sliding ones, of those that select keys."""
        selecting = self.indexer.layers if self.indexer else 0
        kinds = (None, self.layers - self.sliding_layers - selecting), (self.window, self.sliding_layers)
        return (*kinds, (Selected(self.indexer.selected), selecting)) if self.indexer else kinds

    @property
    def layer_params(self) -> int:
        """Parameters of one layer."""
        return self._attention_params + self.mlp_params

    @property
    def mlp_params(self) -> int:
        """Parameters of one layer's MLP, of all experts."""
        return 3 * self.hidden * self.intermediate * self.experts

    @property
    def params(self) -> int:
        """All parameters, embeddings and head included."""
        return self.layers * self.layer_params + self.hidden * self.vocab * (1 if self.tied else 2)

    @property
    def active_layer_params(self) -> int:
        """Parameters of one layer that a token meets."""
        return self._attention_params + self.active_mlp_params

    @property
    def active_mlp_params(self) -> int:
        """Parameters of one layer's MLP that a token meets."""
        return 3 * self.hidden * self.intermediate * self.active

    @property
    def weights_around_attention(self) -> dict[str, int]:
        """Parameters of one layer before and after its attention."""
        after = self.hidden * self.head_dim * self.heads
        return {"before": self._attention_params - after, "after": after + self.mlp_params}

    @property
    def _attention_params(self) -> int:
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)


@dataclass(frozen=True)
class Degrees:
    """How the ranks are arranged, from neighbours to far ranks.

    Attributes:
        ulysses: ranks that exchange heads.
        ring: ranks of a ring.
        tp: tensor-parallel ranks, the innermost axis.
        dp_shard: data-parallel ranks that share parameters.
        dp_replicate: data-parallel ranks with copies of them.
    """

    ulysses: int = 1
    ring: int = 1
    tp: int = 1
    dp_shard: int = 1
    dp_replicate: int = 1

    @property
    def cp(self) -> int:
        return self.ulysses * self.ring

    @property
    def ranks(self) -> int:
        return self.tp * self.cp * self.dp_shard * self.dp_replicate


@dataclass(frozen=True)
class TrainingStep:
    """One step of one data-parallel replica.

    Attributes:
        tokens: tokens of a row.
        rows: rows of the step.
        element: bytes of an element of weights and activations.
        optimizer: bytes a parameter of optimizer state, the fp32 copy included.
        shard_params: FSDP over dp_shard x cp ranks; otherwise every rank holds all parameters.
        checkpointing: layers keep their input only and are computed twice.
        offload: inputs of checkpointed layers are kept in host memory.
        offload_states: weights, their gradients and the optimizer's state are kept in host memory.
        loss_chunk_size: tokens whose logits exist at once; None: all.
        mlp_chunk_size: tokens whose MLP activations exist at once; None: all.
        layer_chunk_size: layers compute in chunks of so many tokens; None: whole.
        head_groups: groups of heads that attend one after the other in such layers.
        keep_attention: such layers whose attention output is kept, where their inputs are: their backward does not
            attend again.
        gradients: bytes of an element of dK and dV while they are sent.
        relay: a ring that passes full blocks on and merges in separate operators, as other libraries do.
        overlap: a step's transfer runs while tiles are computed.
        accumulate: gradients of earlier rows exist from the start.
        trained: share of the parameters that are trained, which alone have gradients and a state of the optimizer.
        kernel: attention kernel, one of `hf_usp.planner.hardware.WORKSPACES`; None: the machine's first, without
            workspace.
    """

    tokens: int
    rows: int = 1
    element: int = 2
    optimizer: int = 12
    shard_params: bool = True
    checkpointing: bool = False
    offload: bool = False
    offload_states: bool = False
    loss_chunk_size: int | None = None
    mlp_chunk_size: int | None = None
    layer_chunk_size: int | None = None
    head_groups: int = 1
    keep_attention: int = 0
    gradients: int = 2
    relay: bool = False
    overlap: bool = True
    accumulate: bool = False
    trained: float = 1.0
    kernel: str | None = None

    @property
    def input_alone(self) -> bool:
        """Whether a layer keeps its input alone until its backward."""
        return self.checkpointing or self.layer_chunk_size is not None


def check(model: ModelShape, degrees: Degrees, job: TrainingStep) -> None:
    """Refuse what is not a size, by name."""
    for owner in (model, degrees, job):
        for name, value in vars(owner).items():
            least = 0 if name in ("sliding_layers", "optimizer", "keep_attention") else 1
            if isinstance(value, int) and not isinstance(value, bool):
                size: dict[str, Any] = {name: value}
                check_positive_int(least=least, **size)
    check_degrees(degrees.cp, degrees.ulysses)
    if job.mlp_chunk_size is not None and model.experts > 1:
        raise UspConfigError(
            f"mlp_chunk_size = {job.mlp_chunk_size} with {model.experts} experts",
            rule="an MLP in chunks has no experts",
            remedy="leave out mlp_chunk_size",
        )
    if model.sliding_layers and (model.window is None or model.sliding_layers > model.layers):
        raise UspConfigError(
            f"{model.sliding_layers} sliding layers of {model.layers}, window {model.window}",
            rule="sliding layers are some of the layers, and have a window",
            remedy=f"give sliding_layers 0 to {model.layers} and a window, or leave both out",
        )
