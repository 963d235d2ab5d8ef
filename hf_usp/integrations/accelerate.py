"""What an `Accelerator` does differently for a sharded model: the methods that are set on that one instance."""

from __future__ import annotations

import functools
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, is_compiled_module
from transformers import PreTrainedModel

from ..batch.shard import ShardOptions
from ..compat import calling_object, is_prepared_loader, is_sharding_wrapper
from ..distributed.agreement import verify_same_on_all_processes
from ..distributed.failures import refuse_after_failure, reporting_failures, translate_connection_errors
from ..distributed.mesh import UspMesh
from ..errors import UspModelError
from ..memory.activation_checkpointing import use_plain_function
from ..memory.activation_offload import offload_checkpoints
from ..memory.chunked_loss import ChunkedLoss, chunked_loss
from ..memory.tiled_mlp import tile_mlps
from ..models.backbone import find_backbone, mask_specs
from ..models.consistency import describe_model
from ..models.hooks import ContextParallelHooks, attach_hooks, attends_sharded, find_model, get_hooks
from ..models.positions import length_dependent_ropes
from ..models.recurrent_layers import has_recurrent_layers
from .data_loader import same_order, same_rows
from .deepspeed import prepare_for_deepspeed, under_deepspeed
from .gathering import Gathering, refuse_shares
from .process_groups import (
    GroupState,
    all_processes,
    count_for_groups,
    keep_full_states_on_first_rank,
    step_for_groups,
)
from .ulysses_degree import chosen_degree


class AcceleratorPatch:
    """What an `Accelerator` made with our config does differently, set on that one instance.

    `prepare` and `prepare_model` attach the sharding hooks to models; its state, `gather`, `reduce`,
    `gather_for_metrics` and the schedulers of `prepare_scheduler` count ranks that share a batch once (groups.py,
    gathering.py); `gather_for_metrics` and `pad_across_processes` refuse logits of which every rank holds a share;
    `prepare_data_loader` gives ranks of a group the same rows (feed.py); `backward` tells the other ranks what ended it
    (faults.py). config: the `UspParallelismConfig`.
    """

    def __init__(self, accelerator: Accelerator, config: Any) -> None:
        self.config = config
        self.accelerator = accelerator
        self.prepared: list[ContextParallelHooks] = []
        self.meshes: dict[int, UspMesh] = {}
        stock = (
            "prepare",
            "prepare_model",
            "prepare_data_loader",
            "prepare_scheduler",
            "pad_across_processes",
            "gather_for_metrics",
            "backward",
        )
        self.stock = {name: getattr(accelerator, name) for name in stock}
        for name in self.stock:
            method = functools.wraps(getattr(Accelerator, name))(functools.partial(getattr(type(self), name), self))
            setattr(accelerator, name, method)
        if config.cp_size > 1 and under_deepspeed(accelerator):
            prepare_for_deepspeed(accelerator, config.cp_size, config.tp_size)
        stock_gather, stock_reduce = (
            translate_connection_errors(accelerator.gather),
            translate_connection_errors(accelerator.reduce),
        )
        self.gathering = Gathering(accelerator, config.cp_size, config.tp_size, stock_gather, stock_reduce)
        if config.cp_size > 1:
            keep_full_states_on_first_rank(accelerator)
            accelerator.state = GroupState(accelerator.state)
            accelerator.gather, accelerator.reduce = self.gathering.gather, self.gathering.reduce

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        self.shard_models_of(calling_object())
        for module in args:
            if isinstance(module, torch.nn.Module):
                self.shard(module)
        given = [count_for_groups(x, self.config.cp_size) for x in args]
        with all_processes(self.accelerator):
            prepared = self.stock["prepare"](*given, **kwargs)
        step_for_groups(self.accelerator)
        return prepared

    def prepare_model(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.shard_models_of(calling_object())
        self.shard(model)
        with all_processes(self.accelerator):
            return self.stock["prepare_model"](model, *args, **kwargs)

    def prepare_scheduler(self, scheduler: Any) -> Any:
        prepared = self.stock["prepare_scheduler"](scheduler)
        step_for_groups(self.accelerator)
        return prepared

    def prepare_data_loader(self, data_loader: Any, *args: Any, **kwargs: Any) -> Any:
        if self.config.cp_size == 1 or is_prepared_loader(data_loader):
            return self.stock["prepare_data_loader"](data_loader, *args, **kwargs)
        model_parallel_size = self.config.cp_size * self.config.tp_size
        same_rows(self.accelerator, data_loader, model_parallel_size)
        with all_processes(self.accelerator):
            prepared = self.stock["prepare_data_loader"](data_loader, *args, **kwargs)
            same_order(prepared, self.accelerator.num_processes, model_parallel_size)
        return prepared

    def backward(self, *args: Any, **kwargs: Any) -> None:
        with reporting_failures(self.prepared):
            self.stock["backward"](*args, **kwargs)

    def shard_models_of(self, caller: Any) -> None:
        """Attach the hooks to other models of a trainer that has wrapped them past `prepare`.

        TRL does so with reference and teacher models, in `prepare_deepspeed` and `prepare_fsdp`. Nothing of ours is
        called there; that they belong to this accelerator shows in the trainer that asks for `prepare` later.
        """
        if getattr(caller, "accelerator", None) is not self.accelerator:
            return
        for module in [value for value in vars(caller).values() if isinstance(value, torch.nn.Module)]:
            if is_sharding_wrapper(module) and attends_sharded(module):
                self.shard(module)

    def shard(self, module: torch.nn.Module) -> None:
        """Attach the hooks to the Transformers model in `module`, once."""
        for earlier in self.prepared:
            if earlier.failed is not None:  # DDP would wait for ranks that wait for this one
                raise refuse_after_failure(earlier.failed)
        use_plain_function(module)
        if self.config.loss_chunk_size is not None and chunked_loss(module) is None:
            ChunkedLoss(find_model(module), self.config.loss_chunk_size)
        if self.config.mlp_chunk_size is not None:
            tile_mlps(find_model(module), self.config.mlp_chunk_size)
        if self.config.offload_checkpoints:
            offload_checkpoints(find_model(module))
        if self.config.cp_size == 1:
            return
        hooks = get_hooks(module)
        if hooks is not None and hooks.mesh in self.meshes.values():
            return
        config, model = self.config, find_model(module)
        settings = {
            name: getattr(self.accelerator, name) for name in ("mixed_precision", "gradient_accumulation_steps")
        }
        verify_same_on_all_processes(describe_model(model) | settings)
        self._check_compilation(module, model)
        if config.ulysses_degree is None:
            device, ranks = self.accelerator.device, config.total_size
            config.ulysses_degree = chosen_degree(config, model, device, ranks)
        degree = config.ulysses_degree
        if degree not in self.meshes:
            axis = self.accelerator.torch_device_mesh
            self.meshes[degree] = UspMesh.from_device_mesh(axis, ulysses_degree=degree)
        options = ShardOptions(config.sequence_order, mask_specs(model), config.kernel)
        self.prepared.append(
            attach_hooks(module, self.meshes[degree], options, config.gather_outputs, config.self_check)
        )

    def _check_compilation(self, module: torch.nn.Module, model: PreTrainedModel) -> None:
        """Refuse models whose graphs would have to take in tensors that carry the layout (masks, positions)."""
        plugin = getattr(self.accelerator.state, "dynamo_plugin", None)
        if not is_compiled_module(module) and (plugin is None or plugin.backend == DynamoBackend.NO):
            return
        for found, reason in (
            (length_dependent_ropes(model), "whose rotary embedding looks at the largest position"),
            (has_recurrent_layers(model), "whose recurrent layers look at the mask"),
            (find_backbone(model).module is not model, "whose sequences are cut inside it (another head, or images)"),
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
