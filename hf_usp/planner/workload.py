"""What a training step is made of: sizes of the model, of the job and of the mesh. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import UspConfigError
from ..sharding.degrees import check_degrees
from ..utils.validation import check_positive_int


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-like decoder. experts, active: routed MLPs a layer has, and a token uses.

    `sliding_layers` of the layers see `window` keys. biases and norms are left out.
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

    @property
    def layer_params(self) -> int:
        """Parameters of one layer."""
        return self._attention_params + 3 * self.hidden * self.intermediate * self.experts

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
    def _attention_params(self) -> int:
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)


@dataclass(frozen=True)
class Degrees:
    """How the ranks are arranged, low to high: tensor parallel, ulysses, ring, sharded and replicated data parallel."""

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
    """One step of one data-parallel replica: `rows` rows of `tokens` tokens, and how it is trained.

    element: bytes of weights and activations. optimizer: bytes a parameter of optimizer state, fp32 copy included.
    shard_params: FSDP over dp_shard x cp ranks; otherwise every rank holds all parameters. checkpointing: layers
    keep their input alone and are computed twice; offload: that input goes to host memory. loss_chunk_size: tokens
    whose logits exist at once. mlp_chunk_size: tokens for which an MLP's wide middle exists at once. gradients: bytes
    an element of dK and dV on their way home. relay: a ring that passes whole blocks on and merges in separate
    operators, as older ones do, instead of this library's direct exchange. overlap: a ring step's transfer runs while
    tiles are computed. accumulate: gradients of earlier rows are there from the start.
    """

    tokens: int
    rows: int = 1
    element: int = 2
    optimizer: int = 12
    shard_params: bool = True
    checkpointing: bool = False
    offload: bool = False
    loss_chunk_size: int | None = None
    mlp_chunk_size: int | None = None
    gradients: int = 2
    relay: bool = False
    overlap: bool = True
    accumulate: bool = False


def check(model: ModelShape, degrees: Degrees, job: TrainingStep) -> None:
    """Refuse what is not a size, by name."""
    for owner in (model, degrees, job):
        for name, value in vars(owner).items():
            least = 0 if name in ("sliding_layers", "optimizer") else 1
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
