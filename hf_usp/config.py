"""Accelerate's side: a parallelism config whose context-parallel axis is ours.

Accelerate's own context parallelism starts wherever `cp_enabled` is true, and it wants FSDP2, sdpa and no sliding
window. This config answers False there, but keeps `cp_size` and a mesh axis named "cp": the prepared dataloader then
gives all ranks of that axis the same batch, the Trainer counts tokens and steps right, and nobody shards but us.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator, ParallelismConfig

from .compat import axis_sizes, set_axis_size
from .distributed.agreement import verify_same_on_all_processes, versions
from .distributed.comm import world_size
from .distributed.mesh import DeviceMesh, kept_mesh
from .errors import UspConfigError
from .integrations.accelerate import AcceleratorPatch
from .integrations.memory_choice import AUTO, MEMORY_OPTIONS, memory_options, validate_memory_options
from .integrations.transformers import check_way, validate_options
from .planner.hardware import check_machine
from .sharding.degrees import check_degrees
from .utils.validation import check_positive_int, check_switches, size_from_environment

AXES = ("dp_replicate", "dp_shard", "cp", "tp")


# Options of a config beside the sizes of its axes, by the names of the constructor's parameters.
OPTIONS = (
    "ulysses_degree",
    "sequence_order",
    "gather_outputs",
    "loss_chunk_size",
    "mlp_chunk_size",
    "layer_chunk_size",
    "head_groups",
    "keep_attention",
    "offload_checkpoints",
    "memory",
    "kernel",
    "self_check",
    "generate",
    "ranks_per_node",
    "machine",
    "sequence_length",
)


OF_A_NODE = ("ranks_per_node", "machine", "sequence_length")  # may differ: a degree is chosen from those of all ranks


class UspParallelismConfig(ParallelismConfig):
    """Parallelism of a run whose sequences are sharded by USP.

    Pass it to `TrainingArguments(parallelism_config=...)` or `Accelerator(parallelism_config=...)`; models that are
    prepared then take full batches and shard them themselves.

    Args:
        cp_size: number of ranks that share a sequence. Default: PARALLELISM_CONFIG_CP_SIZE of the environment, or 1.
        ulysses_degree: number of these ranks that exchange heads; `ring_degree = cp_size // ulysses_degree`. Default:
            chosen at `prepare`, as `hf-usp plan` ranks degrees for this model on this machine, with ulysses groups
            inside a node; on an unknown GPU the degree that sends the fewest bytes.
        dp_replicate_size, dp_shard_size, tp_size: as in `ParallelismConfig`. If neither data-parallel size is given
            (nor set in the environment), the remaining ranks are data parallel: dp_shard under FSDP, else dp_replicate.
        sequence_order: "auto" (chosen by the masks of the batch), "contiguous", "zigzag", or "balanced" (chunks
            assigned so that ranks have equal work, also for packed documents of uneven length).
        gather_outputs: whether logits and hidden states are gathered on every rank. Default: where a call has no
            labels, because a loss will be made of them outside the model; with labels each rank keeps its own tokens.
            False: a loss outside the model is refused.
        loss_chunk_size: with labels, compute the loss of this rank's tokens in chunks of this many tokens, without
            holding all their logits; `outputs.logits` is then None. Loss and gradients stay the same. Also for
            cp_size=1. Under tensor parallelism each rank computes the logits of its entries of the vocabulary.
        mlp_chunk_size: compute the MLPs of all layers, and all norms, in chunks of this many tokens, and again in the
            backward. Also for cp_size=1.
        layer_chunk_size: compute layers in chunks of this many tokens, forward and backward; only attention sees all
            tokens at once. Such a layer keeps its input alone, with or without activation checkpointing. One that
            cannot compute so (recurrent, with dropout) computes as before, and the log says so. For cp_size > 1.
        head_groups: with layer_chunk_size, compute attention in this many groups of heads, one after the other; more
            save more memory. Default: 1.
        keep_attention: with layer_chunk_size, keep attention's output and log-sum-exp of all layers (True) or of this
            many, the last ones, until the backward, which then neither attends forward nor sends forward messages. In
            host memory with offload_checkpoints, else on the device.
        offload_checkpoints: keep the inputs of checkpointed layers (activation checkpointing), and of layers in chunks,
            in host memory, page-locked; or, given a folder, in a file there that has no name and ends with the run.
        memory: "auto": each batch in the fastest way to save memory that fits its length, of whole layers, activation
            checkpointing, layers in chunks, attention kept, inputs in host memory, groups of heads; the log says which
            (docs/memory.md). A dict fixes options by their names: {"layer_chunk_size": 4096, "head_groups": 4}.
            Default: what the options themselves say.
        kernel: name of the attention kernel (docs/kernels.md). Default: the best installed for the device.
        self_check: whether a prepared model first compares a short random batch, sharded and unsharded.
        generate: how `model.generate` of a prepared model works (docs/generation.md). "whole": each rank
            alone, as without hf_usp. "rows": each rank its rows of the batch. "sharded": the prompt's keys and values
            are sharded. "auto": shards for long prompts, rows for others; all ranks of a mesh call it.
        ranks_per_node: ranks on one node; used to keep ulysses groups inside a node. Default: `LOCAL_WORLD_SIZE`.
        machine: preset of `hf-usp plan`, or file of `hf-usp check`, used to choose `ulysses_degree`; on a CPU its
            memory is what memory="auto" counts on. Default: detected from the name of the GPU.
        sequence_length: tokens of a sequence assumed for that choice. Default: 8,192 x cp_size.

    Raises:
        UspConfigError: sizes or options that do not fit each other or the number of processes.
    """

    cp_size: int

    def __init__(
        self,
        cp_size: int | None = None,
        ulysses_degree: int | None = None,
        *,
        dp_replicate_size: int | None = None,
        dp_shard_size: int | None = None,
        tp_size: int | None = None,
        sequence_order: str = "auto",
        gather_outputs: bool | None = None,
        loss_chunk_size: int | None = None,
        mlp_chunk_size: int | None = None,
        layer_chunk_size: int | None = None,
        head_groups: int | None = None,
        keep_attention: bool | int = False,
        offload_checkpoints: bool | str = False,
        memory: str | Mapping[str, Any] | None = None,
        kernel: str | None = None,
        self_check: bool = True,
        generate: str = "whole",
        ranks_per_node: int | None = None,
        machine: str | None = None,
        sequence_length: int | None = None,
        **kwargs: Any,
    ) -> None:
        loss_chunk_size = _renamed(kwargs, "loss_chunk", "loss_chunk_size", loss_chunk_size)
        mlp_chunk_size = _renamed(kwargs, "mlp_chunk", "mlp_chunk_size", mlp_chunk_size)
        self.ulysses_degree = ulysses_degree
        self.sequence_order = sequence_order
        self.gather_outputs = gather_outputs
        given = {"loss_chunk_size": loss_chunk_size, "mlp_chunk_size": mlp_chunk_size}
        given |= {"layer_chunk_size": layer_chunk_size, "head_groups": head_groups, "keep_attention": keep_attention}
        options = memory_options(memory, given | {"offload_checkpoints": offload_checkpoints})
        self.loss_chunk_size, self.mlp_chunk_size = options["loss_chunk_size"], options["mlp_chunk_size"]
        self.layer_chunk_size, self.head_groups = options["layer_chunk_size"], options["head_groups"]
        self.keep_attention, self.offload_checkpoints = options["keep_attention"], options["offload_checkpoints"]
        self.memory = AUTO if memory == AUTO else None  # a dict says what the options say
        self.kernel = kernel
        self.self_check, self.generate = self_check, generate
        self.ranks_per_node, self.machine, self.sequence_length = ranks_per_node, machine, sequence_length
        in_environment = any(f"PARALLELISM_CONFIG_{axis}_SIZE" in os.environ for axis in ("DP_REPLICATE", "DP_SHARD"))
        self.fill_data_parallel = dp_replicate_size is None and dp_shard_size is None and not in_environment
        given = {"dp_replicate": dp_replicate_size, "dp_shard": dp_shard_size, "cp": cp_size, "tp": tp_size}
        given["sp"] = kwargs.pop("sp_size", None)
        for axis, size in given.items():
            if size is None:
                size = size_from_environment(f"PARALLELISM_CONFIG_{axis.upper()}_SIZE", os.environ)
            kwargs[f"{axis}_size"] = size
        super().__init__(**kwargs)

    def __post_init__(self) -> None:
        cp_size = self.cp_size
        check_positive_int(**{f"{axis}_size": getattr(self, f"{axis}_size") for axis in (*AXES, "sp")})
        check_positive_int(cp_size=cp_size, ulysses_degree=self.ulysses_degree)
        if self.ulysses_degree is not None:
            check_degrees(cp_size, self.ulysses_degree)
        validate_options(self.sequence_order, self.kernel)
        check_choice(self.ranks_per_node, self.machine, self.sequence_length)
        validate_memory_options(self.memory_options, self.memory, self.gather_outputs, cp_size)
        check_switches(gather_outputs=self.gather_outputs is None or self.gather_outputs)
        check_way(self.generate)
        check_switches(self_check=self.self_check)
        # Accelerate sets up its own context parallelism for cp_size > 1, and refuses plain DDP around it.
        self.cp_size = 1
        try:
            super().__post_init__()
        except ValueError as problem:
            raise UspConfigError(
                f"axes that Accelerate refuses: {problem}",
                rule="all axes but cp are those of Accelerate's ParallelismConfig",
                remedy="change the sizes as it says, for example dp_replicate_size to dp_shard_size beside tp_size",
            ) from problem
        self.cp_size = axis_sizes(self)["cp"] = cp_size
        if self.sp_size > 1:
            raise UspConfigError(
                f"sp_size={self.sp_size}", rule="sequences are sharded once, along cp", remedy="leave sp_size at 1"
            )

    @property
    def ring_degree(self) -> int | None:
        """cp_size // ulysses_degree; None until the ulysses degree is chosen."""
        return None if self.ulysses_degree is None else self.cp_size // self.ulysses_degree

    @property
    def memory_options(self) -> dict[str, Any]:
        """The options that save memory, by name."""
        return {name: getattr(self, name) for name in MEMORY_OPTIONS}

    @property
    def cp_enabled(self) -> bool:
        """False: keeps Accelerate's own context parallelism out. Ours is on when cp_size > 1."""
        return False

    @property
    def active_mesh_dims(self) -> list[str]:
        return super().active_mesh_dims + (["cp"] if self.cp_size > 1 else [])

    @property
    def dp_shard_cp_dim_names(self) -> list[str]:
        return super().dp_shard_cp_dim_names + (["cp"] if self.cp_size > 1 else [])

    @property
    def dp_cp_dim_names(self) -> list[str]:
        return super().dp_cp_dim_names + (["cp"] if self.cp_size > 1 else [])

    def of_groups(self) -> UspParallelismConfig:
        """This config as an accelerator tells of it, whose processes are groups of cp_size ranks."""
        return _OfGroups(self)

    def to_json(self) -> dict[str, Any]:
        """The sizes and options as `TrainingArguments` writes them: arguments that make such a config again.

        Data-parallel sizes that are still to be filled in are None.
        """
        sizes: dict[str, Any] = {f"{axis}_size": size for axis, size in axis_sizes(self).items()}
        if self.fill_data_parallel:
            sizes |= {"dp_replicate_size": None, "dp_shard_size": None}
        return sizes | {name: getattr(self, name) for name in OPTIONS}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.to_json().items())})"

    def build_device_mesh(self, device_type: str) -> DeviceMesh | None:
        """The mesh over all processes, ranks left over filled in; None for a single one.

        Every rank comes here once, before there is any group: raises `UspConfigError` on all of them where one has
        other options or versions.
        """
        world = world_size()
        options = {name: value for name, value in self.to_json().items() if name not in OF_A_NODE}
        verify_same_on_all_processes(versions() | options)
        self._adopt_model_sizes(world)
        if self.fill_data_parallel and world % self.total_size == 0 and world > self.total_size:
            sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
            set_axis_size(self, "dp_shard" if sharded else "dp_replicate", world // self.total_size)
        self.fill_data_parallel = False
        if self.total_size != world:
            raise _wrong_world(self, world)
        if world == 1:
            return None
        key = ("device mesh", device_type, *(axis_sizes(self)[axis] for axis in AXES))
        build = super().build_device_mesh
        return kept_mesh(key, lambda: build(device_type))

    def _adopt_model_sizes(self, world: int) -> None:
        """Take over what the Trainer reads off a model that was loaded with a `DistributedConfig` and sets on us.

        Such a model's data-parallel axis (its `fsdp_size`) is dp_shard x cp here: it knows no axis of ours.
        """
        if self.tp_size > 1 and self.total_size == world * self.cp_size and self.dp_shard_size % self.cp_size == 0:
            set_axis_size(self, "dp_shard", self.dp_shard_size // self.cp_size)
        for axis in AXES:
            axis_sizes(self)[axis] = getattr(self, f"{axis}_size")

    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        """Called by Accelerate with the accelerator that was made with this config: here its `prepare` learns of us."""
        if self.total_size != accelerator.num_processes:
            raise _wrong_world(self, accelerator.num_processes)
        options = (self.loss_chunk_size, self.mlp_chunk_size, self.offload_checkpoints, self.memory)
        if self.cp_size > 1 or any(options):
            AcceleratorPatch(accelerator, self)


class _OfGroups(UspParallelismConfig):
    """A config with the attributes of another one, but a `cp_size` of 1."""

    def __init__(self, config: UspParallelismConfig) -> None:
        self.__dict__ = config.__dict__

    @property
    def cp_size(self) -> int:  # type: ignore[override]
        """1: the Trainer divides a gathered token count by it, and our `gather` counts a group once.

        The Trainer divides the number of all processes by it too, for the batch size in its log. That number is
        cp_size times too large (docs/troubleshooting.md).
        """
        return 1


def _renamed(kwargs: dict[str, Any], old: str, new: str, value: int | None) -> int | None:
    """The value of an option that may be given by its old name, for one release."""
    if old not in kwargs:
        return value
    warnings.warn(f"UspParallelismConfig({old}=...) is now {new}=...", FutureWarning, stacklevel=3)
    given = kwargs.pop(old)
    return given if value is None else value


def _wrong_world(config: UspParallelismConfig, world: int) -> UspConfigError:
    sizes = {axis: axis_sizes(config)[axis] for axis in AXES}
    product = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    return UspConfigError(
        f"{product} = {config.total_size} ranks, in {world} process(es)",
        rule="the product of the sizes is the number of processes",
        remedy=f"start {config.total_size} processes (accelerate launch --num_processes {config.total_size}), or "
        "choose sizes whose product fits; leave both data-parallel sizes out to have them filled in",
    )


def check_choice(ranks_per_node: int | None, machine: str | None, sequence_length: int | None) -> None:
    """Raise `UspConfigError` for what no ulysses degree can be chosen from. Files are looked at when they are read."""
    check_positive_int(ranks_per_node=ranks_per_node, sequence_length=sequence_length)
    if machine is not None and not (isinstance(machine, str) and machine.endswith(".json")):
        check_machine(machine)
