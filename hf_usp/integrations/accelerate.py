"""The attributes that hf_usp replaces on one `Accelerator`: listed in `ACCELERATOR_CHANGES`, restored by `remove`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, is_compiled_module
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..compat import LOADER_MESH, calling_object, is_prepared_loader
from ..distributed.agreement import verify_same_on_all_processes
from ..distributed.comm import world_size
from ..distributed.failures import refuse_after_failure, reporting_failures, translate_connection_errors
from ..distributed.mesh import UspMesh
from ..errors import UspModelError
from ..models.find import attends_sharded, find_model
from ..models.hooks import ContextParallelHooks, get_hooks
from ..models.traits import inspect_model
from ..planner.workload import TrainingStep
from ..utils.patches import AttributePatches
from .completions import check_streamed_prompts, count_once, repeat_for_groups
from .data_loader import same_order, same_rows
from .deepspeed import prepare_for_deepspeed, under_deepspeed
from .gathering import Gathering, refuse_shares
from .memory_choice import AUTO, choose_memory
from .process_groups import (
    GroupState,
    all_processes,
    count_for_groups,
    keep_full_states_on_first_rank,
    step_for_groups,
)
from .random_state import share_random_state
from .transformers import apply_context_parallel, apply_memory_options, remove_from_model
from .ulysses_degree import chosen_degree

if TYPE_CHECKING:
    from ..config import UspParallelismConfig


class Replacement(NamedTuple):
    """A replaced attribute of an accelerator.

    Attributes:
        what: the replacement.
        why: what it is for.
        upstream: the issue that would make it unnecessary, or "none".
    """

    what: str
    why: str
    upstream: str


# Attributes of one `Accelerator`. Other accelerators and the class are untouched.
ACCELERATOR_CHANGES = {
    "prepare": Replacement(
        "applies context parallelism to models, then Accelerate's own",
        "a ParallelismConfig is not told of the models",
        "huggingface/accelerate#4209 adds sequence parallelism to Accelerate",
    ),
    "prepare_model": Replacement(
        "the same for a single model", "TRL and the Trainer call it for some models", "huggingface/accelerate#4209"
    ),
    "prepare_data_loader": Replacement(
        "gives all ranks of a sequence the same rows in one order",
        "Accelerate treats every process as one with rows of its own",
        "huggingface/accelerate#4209",
    ),
    "prepare_scheduler": Replacement(
        "a prepared scheduler takes a step for each group of ranks",
        "Accelerate takes one for each process",
        "huggingface/accelerate#2142 describes the steps",
    ),
    "pad_across_processes": Replacement(
        "refuses logits of which every rank has a local shard", "they would be padded as rows", "none"
    ),
    "gather_for_metrics": Replacement(
        "ranks that share a batch count once; refuses local shards of logits",
        "Accelerate takes every process for rows of its own",
        "huggingface/transformers#48842",
    ),
    "gather": Replacement(
        "ranks that share a batch count once",
        "counts gathered by hand would be cp_size times too large",
        "huggingface/accelerate#3193",
    ),
    "reduce": Replacement("a sum counts ranks that share a batch once", "as for gather", "huggingface/accelerate#3193"),
    "backward": Replacement("tells other ranks why it failed", "they would wait until the timeout", "none"),
    "state": Replacement(
        "num_processes is the number of groups of ranks that share a batch",
        "the Trainer and scripts multiply and divide by it (decision 21)",
        "huggingface/accelerate#4209",
    ),
    "dataloader_config": Replacement(
        "a copy with dispatch_batches=False", "every rank reads the rows of an iterable dataset itself", "none"
    ),
    LOADER_MESH: Replacement(
        "under DeepSpeed, a mesh whose axis `tp` holds the ranks that share a batch",
        "Accelerate's data loaders look at this axis alone under DeepSpeed",
        "none",
    ),
    "state.fsdp_plugin.state_dict_config": Replacement(
        "a full state dict stays on the first rank", "Accelerate decides it by num_processes", "none"
    ),
}


class AcceleratorPatch:
    """The replaced attributes of one `Accelerator` that was made with a `UspParallelismConfig`.

    config: the `UspParallelismConfig`. `remove` restores the accelerator, its data loaders and its schedulers.
    """

    def __init__(self, accelerator: Accelerator, config: UspParallelismConfig) -> None:
        self.config = config
        self.accelerator = accelerator
        self.prepared: list[ContextParallelHooks] = []
        self.meshes: dict[int, UspMesh] = {}
        self.patches = AttributePatches()
        methods = [name for name in ACCELERATOR_CHANGES if name in vars(type(self))]
        self.stock = {name: getattr(accelerator, name) for name in methods}
        for name in methods:
            method = functools.wraps(getattr(Accelerator, name))(functools.partial(getattr(type(self), name), self))
            self.patches.set(accelerator, name, method)
        if config.cp_size > 1 and under_deepspeed(accelerator):
            prepare_for_deepspeed(accelerator, config.cp_size, config.tp_size, self.patches)
        stock_gather = translate_connection_errors(accelerator.gather)
        stock_reduce = translate_connection_errors(accelerator.reduce)
        self.gathering = Gathering(accelerator, config.cp_size, config.tp_size, stock_gather, stock_reduce)
        if config.cp_size > 1:
            keep_full_states_on_first_rank(accelerator, self.patches)
            self.patches.set(accelerator, "state", GroupState(accelerator.state))
            self.patches.set(accelerator, "gather", self.gathering.gather)
            self.patches.set(accelerator, "reduce", self.gathering.reduce)

    def remove(self) -> None:
        """Restore the accelerator and whatever it has prepared but models, which may go on without it."""
        self.patches.undo()

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        self.adopt(calling_object(), args)
        for module in args:
            if isinstance(module, torch.nn.Module):
                self.shard(module)
        given = [count_for_groups(x, self.config.cp_size) for x in args]
        with all_processes(self.accelerator):
            prepared = self.stock["prepare"](*given, **kwargs)
        step_for_groups(self.accelerator, self.patches)
        self._share_random_state(args)
        return prepared

    def prepare_model(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.adopt(calling_object(), ())
        self.shard(model)
        with all_processes(self.accelerator):
            prepared = self.stock["prepare_model"](model, *args, **kwargs)
        self._share_random_state((model,))
        return prepared

    def prepare_scheduler(self, scheduler: Any) -> Any:
        prepared = self.stock["prepare_scheduler"](scheduler)
        step_for_groups(self.accelerator, self.patches)
        return prepared

    def prepare_data_loader(self, data_loader: Any, *args: Any, **kwargs: Any) -> Any:
        if self.config.cp_size == 1 or is_prepared_loader(data_loader):
            return self.stock["prepare_data_loader"](data_loader, *args, **kwargs)
        model_parallel_size = self.config.cp_size * self.config.tp_size
        same_rows(self.accelerator, data_loader, model_parallel_size, self.patches)
        repeat_for_groups(data_loader, world_size() // model_parallel_size, self.patches)
        with all_processes(self.accelerator):
            prepared = self.stock["prepare_data_loader"](data_loader, *args, **kwargs)
            same_order(prepared, self.accelerator.num_processes, model_parallel_size, self.patches)
        return prepared

    def backward(self, *args: Any, **kwargs: Any) -> None:
        with reporting_failures(self.prepared):
            self.stock["backward"](*args, **kwargs)

    def adopt(self, caller: Any, args: Sequence[Any]) -> None:
        """Take in models that belong to this accelerator without passing `prepare`, as the trainer that calls shows.

        Its models get the hooks. TRL wraps reference, teacher and reward models in `prepare_deepspeed` and
        `prepare_fsdp`, and computes log-probabilities of a reference with the model before it is prepared.
        """
        if self.config.cp_size == 1 or getattr(caller, "accelerator", None) is not self.accelerator:
            return
        values = [x for value in vars(caller).values() for x in (value if isinstance(value, list | tuple) else [value])]
        for module in values:
            if isinstance(module, torch.nn.Module) and attends_sharded(module):
                self.shard(module)
        group_size = self.config.cp_size * self.config.tp_size
        count_once(caller, group_size, self.patches)
        for loader in args:
            if isinstance(loader, DataLoader):
                check_streamed_prompts(caller, loader, world_size() // group_size)

    def _share_random_state(self, args: Sequence[Any]) -> None:
        if self.config.cp_size > 1 and any(isinstance(x, torch.nn.Module) for x in args):
            share_random_state(self.config.cp_size * self.config.tp_size)

    def shard(self, module: torch.nn.Module) -> None:
        """Apply context parallelism to the Transformers model in `module`, once."""
        for earlier in self.prepared:
            if earlier.failed is not None:  # DDP would wait for ranks that wait for this one
                raise refuse_after_failure(earlier.failed)
        self._apply(module)
        if self.config.memory == AUTO:
            self._choose_memory(find_model(module))

    def _apply(self, module: torch.nn.Module) -> None:
        config, hooks = self.config, get_hooks(module)
        if config.cp_size == 1 or (hooks is not None and hooks.mesh in self.meshes.values()):
            apply_memory_options(module, **config.memory_options)
            return
        model = find_model(module)
        names = ("mixed_precision", "gradient_accumulation_steps")
        verify_same_on_all_processes({name: getattr(self.accelerator, name) for name in names})
        self._check_compilation(module, model)
        apply_context_parallel(
            module,
            self._mesh(model),
            sequence_order=config.sequence_order,
            kernel=config.kernel,
            gather_outputs=config.gather_outputs,
            self_check=config.self_check,
            generate=config.generate,
            **config.memory_options,
        )
        applied = get_hooks(module)
        assert applied is not None
        self.prepared.append(applied)

    def _choose_memory(self, model: PreTrainedModel) -> None:
        """The way to save memory is chosen for each batch, by the dtypes and the sharding of this run."""
        accelerator, config = self.accelerator, self.config
        sharded = accelerator.distributed_type == DistributedType.FSDP
        element = 2 if accelerator.mixed_precision in ("fp16", "bf16") else model.dtype.itemsize
        mixed = element < model.dtype.itemsize
        step = TrainingStep(
            1,
            element=element,
            optimizer=12 if mixed else 2 * element,
            gradients=element,
            shard_params=sharded,
            accumulate=accelerator.gradient_accumulation_steps > 1,
            offload_states=sharded and isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy),
        )
        choose_memory(
            model,
            None if config.cp_size == 1 else self._mesh(model),
            accelerator.device,
            step=step,
            machine=config.machine,
            dp_shard=config.dp_shard_size,
            tp=config.tp_size,
        )

    def _mesh(self, model: PreTrainedModel) -> UspMesh:
        """The mesh of this accelerator, whose ulysses degree the first model may decide."""
        config = self.config
        if config.ulysses_degree is None:
            config.ulysses_degree = chosen_degree(config, model, self.accelerator.device, config.total_size)
        degree = config.ulysses_degree
        if degree not in self.meshes:
            axis = self.accelerator.torch_device_mesh
            self.meshes[degree] = UspMesh.from_device_mesh(axis, ulysses_degree=degree)
        return self.meshes[degree]

    def _check_compilation(self, module: torch.nn.Module, model: PreTrainedModel) -> None:
        """Refuse models whose graphs would have to take in tensors that carry the layout (masks, positions)."""
        plugin = getattr(self.accelerator.state, "dynamo_plugin", None)
        if not is_compiled_module(module) and (plugin is None or plugin.backend == DynamoBackend.NO):
            return
        traits = inspect_model(model)
        for found, reason in (
            (traits.length_dependent_rope, "whose rotary embedding looks at the largest position"),
            (traits.recurrent, "whose recurrent layers look at the mask"),
            (traits.backbone.inside, "whose sequences are sharded inside it (another head, or images)"),
        ):
            if found:
                raise UspModelError(
                    f"torch_compile with {type(model).__name__}, {reason}",
                    rule="compiled graphs cannot take in the tensors with which the layout of a batch travels there",
                    remedy="leave out torch_compile, or compile attention layers alone (layer.compile())",
                )

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        refuse_shares(input_data, self.prepared)
        if self.config.cp_size == 1:
            return self.stock["gather_for_metrics"](input_data, use_gather_object)
        return self.gathering.gather_for_metrics(input_data, use_gather_object)

    def pad_across_processes(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(tensor, tuple) and not tensor and self.config.loss_chunk_size is not None:
            raise UspModelError(
                "outputs to be gathered of a model whose loss is computed in chunks",
                rule="with loss_chunk_size there are no logits",
                remedy="leave out loss_chunk_size for predict and compute_metrics, or prediction_loss_only=True",
            )
        refuse_shares(tensor, self.prepared)
        return self.stock["pad_across_processes"](tensor, *args, **kwargs)


def remove_context_parallel(target: nn.Module | Accelerator) -> None:
    """Restore a model, or an accelerator, to what it was before hf_usp changed it.

    Args:
        target: a model (or what wraps it) after `apply_context_parallel` or `Accelerator.prepare`; or an `Accelerator`
            that was made with a `UspParallelismConfig`. Models and accelerators are restored independently.
    """
    if not isinstance(target, Accelerator):
        remove_from_model(target)
        return
    method = vars(target).get("prepare")
    patch = method.args[0] if isinstance(method, functools.partial) and method.args else None
    if isinstance(patch, AcceleratorPatch):
        patch.remove()
