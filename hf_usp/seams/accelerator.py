"""What an `Accelerator` does differently for a sharded model: the methods that are set on that one instance."""

from __future__ import annotations

import functools
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, is_compiled_module
from transformers import PreTrainedModel

from ..agreement import check_alike
from ..errors import UspModelError
from ..faults import after, explained, telling
from ..mesh import UspMesh
from ..models.alike import description
from ..models.bodies import find_body, mask_kinds
from ..models.chunked_loss import ChunkedLoss, chunked_loss
from ..models.chunked_mlp import chunk_mlps
from ..models.offload import offload_checkpoints
from ..models.prepare import ShardedForward, attach, find_model, sharded_forward
from ..models.recurrent import has_recurrent_layers
from ..recompute import use_plain_function
from ..rope import length_dependent_ropes
from ..shard import ShardOptions
from .choice import chosen_degree
from .feed import same_rows
from .gathering import gather_once, refuse_shares
from .token_counts import gather_seen_once
from .zero import prepare_for_deepspeed, under_deepspeed


class AcceleratorSeam:
    """What an `Accelerator` made with our config does differently, set on that one instance.

    `prepare` and `prepare_model` attach the sharding hooks to models; `gather_for_metrics` counts ranks that share a
    batch once, and refuses logits of which every rank holds a share, as `pad_across_processes` does (gathering.py);
    `prepare_data_loader` gives these ranks the same rows (feed.py); `backward` tells the other ranks what ended it
    (faults.py). config: the `UspParallelismConfig`.
    """

    def __init__(self, accelerator: Accelerator, config: Any) -> None:
        self.config = config
        self.accelerator = accelerator
        self.prepared: list[ShardedForward] = []
        self.meshes: dict[int, UspMesh] = {}
        stock = (
            "prepare", "prepare_model", "prepare_data_loader", "pad_across_processes", "gather_for_metrics", "backward"
        )  # fmt: skip
        self.stock = {name: getattr(accelerator, name) for name in stock}
        for name in self.stock:
            method = functools.wraps(getattr(Accelerator, name))(functools.partial(getattr(type(self), name), self))
            setattr(accelerator, name, method)
        if config.cp_size > 1 and under_deepspeed(accelerator):
            prepare_for_deepspeed(accelerator, config.cp_size, config.tp_size)
        accelerator.gather = gather_seen_once(explained(accelerator.gather), config.cp_size * config.tp_size)

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        for module in args:
            if isinstance(module, torch.nn.Module):
                self.shard(module)
        return self.stock["prepare"](*args, **kwargs)

    def prepare_model(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.shard(model)
        return self.stock["prepare_model"](model, *args, **kwargs)

    def prepare_data_loader(self, data_loader: Any, *args: Any, **kwargs: Any) -> Any:
        if self.config.cp_size > 1 and not getattr(data_loader, "_is_accelerate_prepared", False):
            same_rows(self.accelerator, data_loader, self.config.cp_size * self.config.tp_size)
        return self.stock["prepare_data_loader"](data_loader, *args, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> None:
        with telling(self.prepared):
            self.stock["backward"](*args, **kwargs)

    def shard(self, module: torch.nn.Module) -> None:
        """Attach the hooks to the Transformers model in `module`, once."""
        for earlier in self.prepared:
            if earlier.failed is not None:  # DDP would wait for ranks that wait for this one
                raise after(earlier.failed)
        use_plain_function(module)
        if self.config.loss_chunk is not None and chunked_loss(module) is None:
            ChunkedLoss(find_model(module), self.config.loss_chunk)
        if self.config.mlp_chunk is not None:
            chunk_mlps(find_model(module), self.config.mlp_chunk)
        if self.config.offload_checkpoints:
            offload_checkpoints(find_model(module))
        if self.config.cp_size == 1:
            return
        hooks = sharded_forward(module)
        if hooks is not None and hooks.mesh in self.meshes.values():
            return
        config, model = self.config, find_model(module)
        settings = {
            name: getattr(self.accelerator, name) for name in ("mixed_precision", "gradient_accumulation_steps")
        }
        check_alike(description(model) | settings)
        self._check_compilation(module, model)
        if config.ulysses_degree is None:
            device, ranks = self.accelerator.device, self.accelerator.num_processes
            config.ulysses_degree = chosen_degree(config, model, device, ranks)
        degree = config.ulysses_degree
        if degree not in self.meshes:
            axis = self.accelerator.torch_device_mesh
            self.meshes[degree] = UspMesh.from_device_mesh(axis, ulysses_degree=degree)
        options = ShardOptions(config.sequence_order, mask_kinds(model), config.kernel)
        self.prepared.append(attach(module, self.meshes[degree], options, config.gather_outputs, config.self_check))

    def _check_compilation(self, module: torch.nn.Module, model: PreTrainedModel) -> None:
        """Refuse models whose graphs would have to take in tensors that carry the layout (masks, positions)."""
        plugin = getattr(self.accelerator.state, "dynamo_plugin", None)
        if not is_compiled_module(module) and (plugin is None or plugin.backend == DynamoBackend.NO):
            return
        for found, reason in (
            (length_dependent_ropes(model), "whose rotary embedding looks at the largest position"),
            (has_recurrent_layers(model), "whose recurrent layers look at the mask"),
            (find_body(model).module is not model, "whose sequences are cut inside it (another head, or images)"),
        ):
            if found:
                raise UspModelError(
                    f"torch_compile with {type(model).__name__}, {reason}",
                    rule="compiled graphs cannot take in the tensors with which the layout of a batch travels there",
                    remedy="leave out torch_compile, or compile attention layers alone (layer.compile())",
                )

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        refuse_shares(input_data, self.prepared)
        copies = self.config.cp_size * self.config.tp_size
        if copies == 1:
            return self.stock["gather_for_metrics"](input_data, use_gather_object)
        return gather_once(self.accelerator, input_data, copies, use_gather_object)

    def pad_across_processes(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(tensor, tuple) and not tensor and self.config.loss_chunk is not None:
            raise UspModelError(
                "outputs to be gathered of a model whose loss is computed in chunks",
                rule="with loss_chunk there are no logits",
                remedy="leave out loss_chunk for predict and compute_metrics, or prediction_loss_only=True",
            )
        refuse_shares(tensor, self.prepared)
        return self.stock["pad_across_processes"](tensor, *args, **kwargs)
