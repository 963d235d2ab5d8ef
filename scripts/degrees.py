"""The context-parallel flags of the scripts, and the `UspParallelismConfig` that they mean.

    --context-parallel-size 8                                              ulysses 8
    --context-parallel-size 8 --context-parallel-algo megatron_cp_algo     ring 8
    --context-parallel-size 8 --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2     ulysses 2 x ring 4
    ... --tensor-model-parallel-size 2     every layer split over 2 neighbours, weights sharded over the rest

Everything is checked when the flags are parsed, before a model is loaded or a process group starts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from transformers.distributed import DistributedConfig

import hf_usp
from hf_usp.errors import UspConfigError
from hf_usp.sharding.degrees import check_degrees
from hf_usp.sharding.heads import split_heads

ALGORITHMS = ("ulysses_cp_algo", "megatron_cp_algo", "hybrid_cp_algo")


@dataclass
class ContextParallelArguments:
    """Put this first among the dataclasses of an `HfArgumentParser`: wrong flags then end the run before it starts."""

    context_parallel_size: int = field(default=1, metadata={"help": "Processes that share one sequence."})
    context_parallel_algo: str = field(
        default="ulysses_cp_algo",
        metadata={"help": "ulysses_cp_algo, megatron_cp_algo (a pure ring) or hybrid_cp_algo (ulysses x ring)."},
    )
    ulysses_degree_in_cp: int | None = field(
        default=None, metadata={"help": "Ulysses degree of hybrid_cp_algo; the ring degree is size / this."}
    )

    tensor_model_parallel_size: int = field(
        default=1, metadata={"help": "Processes that split every layer (a pretrained model's own tp_plan)."}
    )
    loss_chunk_size: int | None = field(
        default=None,
        metadata={"help": "Compute the loss in chunks of so many tokens, without ever holding all logits."},
    )
    mlp_chunk_size: int | None = field(default=None, metadata={"help": "Compute MLPs in chunks of so many tokens."})
    layer_chunk_size: int | None = field(default=None, metadata={"help": "Compute layers in chunks of so many tokens."})
    head_groups: int | None = field(
        default=None, metadata={"help": "With --layer-chunk-size: attend in so many groups of heads."}
    )
    keep_attention: int | None = field(
        default=None, metadata={"help": "With --layer-chunk-size: keep attention's output of so many layers."}
    )
    offload_checkpoints: bool = field(
        default=False,
        metadata={"help": "With checkpointing or --layer-chunk-size: keep the inputs of layers in CPU memory."},
    )

    memory: str | None = field(
        default=None, metadata={"help": "auto: each batch in the fastest way to save memory that fits its length."}
    )

    def __post_init__(self) -> None:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        check_world(self.context_parallel_size, world)
        if self.tensor_model_parallel_size < 1 or world % (
            self.context_parallel_size * self.tensor_model_parallel_size
        ):
            raise UspConfigError(
                f"--tensor-model-parallel-size {self.tensor_model_parallel_size} x --context-parallel-size "
                f"{self.context_parallel_size} with {world} processes",
                rule="the product divides the number of processes; the quotient is data parallel",
                remedy="start a multiple of the product",
            )
        check_degrees(self.context_parallel_size, self.ulysses_degree)

    @property
    def ulysses_degree(self) -> int:
        """Processes that exchange heads; the other factor of the context-parallel size is the ring."""
        if self.context_parallel_algo not in ALGORITHMS:
            raise UspConfigError(
                f"--context-parallel-algo {self.context_parallel_algo}",
                rule=f"one of {', '.join(ALGORITHMS)}",
                remedy="hybrid_cp_algo with --ulysses-degree-in-cp reaches every 2D mesh",
            )
        if self.context_parallel_algo == "hybrid_cp_algo":
            if self.ulysses_degree_in_cp is None:
                raise UspConfigError(
                    "--context-parallel-algo hybrid_cp_algo without --ulysses-degree-in-cp",
                    rule="context-parallel size = ulysses degree x ring degree",
                    remedy="add --ulysses-degree-in-cp U, for example the processes of one node or a divisor of them",
                )
            return self.ulysses_degree_in_cp
        degree = self.context_parallel_size if self.context_parallel_algo == "ulysses_cp_algo" else 1
        if self.ulysses_degree_in_cp not in (None, degree):
            raise UspConfigError(
                f"--ulysses-degree-in-cp {self.ulysses_degree_in_cp} with --context-parallel-algo "
                f"{self.context_parallel_algo}, which means {degree}",
                rule="only hybrid_cp_algo leaves the ulysses degree open",
                remedy="choose hybrid_cp_algo, or leave out --ulysses-degree-in-cp",
            )
        return degree

    def parallelism_config(self) -> hf_usp.UspParallelismConfig | None:
        """None where there is nothing to share: one process per sequence is what the Trainer does by itself."""
        chunks = any(n is not None for n in (self.loss_chunk_size, self.mlp_chunk_size, self.layer_chunk_size))
        if self.context_parallel_size == 1 and not (chunks or self.offload_checkpoints or self.memory):
            return None
        return hf_usp.UspParallelismConfig(
            cp_size=self.context_parallel_size,
            ulysses_degree=self.ulysses_degree,
            loss_chunk_size=self.loss_chunk_size,
            mlp_chunk_size=self.mlp_chunk_size,
            layer_chunk_size=self.layer_chunk_size,
            head_groups=self.head_groups,
            keep_attention=False if self.keep_attention is None else self.keep_attention,
            offload_checkpoints=self.offload_checkpoints,
            memory=self.memory,
        )

    def distributed_config(self) -> DistributedConfig | None:
        """The argument by which `from_pretrained` splits layers while it loads; FSDP2 over all other processes."""
        ranks = self.tensor_model_parallel_size
        if ranks == 1:
            return None
        return DistributedConfig(tp_size=ranks, fsdp_size=int(os.environ.get("WORLD_SIZE", "1")) // ranks)

    def describe(self, num_heads: int, num_kv_heads: int) -> str:
        """One line for the log: the mesh, and how many query heads every ulysses rank gets."""
        degree = self.ulysses_degree
        heads = [share.num_query for share in split_heads(num_heads, num_kv_heads, degree)]
        evenness = "evenly" if len(set(heads)) == 1 else "unevenly"
        return (
            f"ulysses {degree} x ring {self.context_parallel_size // degree}; {num_heads} query and {num_kv_heads} kv "
            f"heads, split {evenness}: {' + '.join(map(str, heads))} query heads per ulysses rank"
        )


def check_world(size: int, world: int) -> None:
    """Raise `UspConfigError` unless the processes form whole groups of `size`."""
    if size < 1 or world % size:
        raise UspConfigError(
            f"--context-parallel-size {size} with {world} processes",
            rule="the context-parallel size divides the number of processes; the quotient is data parallel",
            remedy=f"choose one of {', '.join(str(d) for d in range(1, world + 1) if world % d == 0)}, or start a "
            "multiple of it with accelerate launch --num_processes or torchrun --nproc_per_node",
        )
