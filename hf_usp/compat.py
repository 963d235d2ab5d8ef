"""Every private or version-dependent name of another library that hf_usp uses: one small function for each.

A new release of one of them may break this file, and nothing else. A docstring says what its entry is for and when it
can go; each section says which releases were read. tests/test_laws.py refuses such names in other files.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import zlib
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from packaging.version import Version
from torch.distributed import distributed_c10d
from torch.utils import _python_dispatch, checkpoint
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # the base of what sees every operator

# Leaves of nested lists, dicts and model outputs. Go once `torch.utils.pytree` is there (pytorch/pytorch#65761).
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map

from .errors import UspConfigError

Owner = TypeVar("Owner")

# --------------------------------------------------------------------------------------------------- supported versions

OLDEST = (("torch", "2.11"), ("transformers", "5.17"), ("accelerate", "1.15"))
FLASH_ATTN = ((2, 7), (3, 0))  # before 2.7 the window was one tuple; FlashAttention 3 is another interface
RG_LRU_SCAN = "_rnn_scan"  # the recurrence of RecurrentGemma, a method. Goes when it is a function of its module


def check_versions() -> None:
    """Raise `UspConfigError` where a package that hf_usp builds on is missing or too old."""
    for package, oldest in OLDEST:
        remedy = f"pip install '{package}>={oldest}'"
        try:
            found = version(package)
        except PackageNotFoundError:
            raise UspConfigError(f"{package} is not installed", rule=f"{package} >= {oldest}", remedy=remedy) from None
        # Development and local builds ("2.11.0a0+git", "2.11.0+cpu") count as their release.
        if Version(Version(found).base_version) < Version(oldest):
            raise UspConfigError(f"{package} {found}", rule=f"{package} >= {oldest}", remedy=remedy)


def installed_version(package: str) -> str | None:
    """The version of an installed package; None where it is not installed. For reports, never for a decision."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def is_older(package: str, oldest: str) -> bool:
    """Whether an installed package is older than a version; pre-releases count."""
    return Version(version(package)) < Version(oldest)


def sources() -> str:
    """A checksum of the installed sources of hf_usp: the same version may be another state of a checkout."""
    total, root = 0, Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        total = zlib.crc32(path.read_bytes(), zlib.crc32(path.relative_to(root).as_posix().encode(), total))
    return f"{total:08x}"


# -------------------------------------------- torch.distributed: private in torch 2.11 to 2.13, and still there in 2.14


def default_store() -> Any:
    """The store in which the ranks of the run found each other; `Any`, because torch's type lacks its `append`."""
    return distributed_c10d._get_default_store()


def group_by_name(name: str) -> dist.ProcessGroup:
    """The process group of a name, for operators, whose arguments cannot be groups. Goes once they can be."""
    return distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def group_timeout(group: dist.ProcessGroup) -> timedelta | None:
    """How long ranks of a group wait for each other; None where its backends do not say, or say different times."""
    try:  # a backend may have no such option
        timeouts = {group._get_backend(device).options._timeout for device in group._device_types}
    except Exception:
        return None
    return timeouts.pop() if len(timeouts) == 1 else None


def set_group_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Set the timeout of a group that exists. Goes once `init_device_mesh` takes one (pytorch/pytorch#119613)."""
    distributed_c10d._set_pg_timeout(timeout, group)


def process_groups() -> set[dist.ProcessGroup]:
    """All groups of this process, to find those that `init_device_mesh` made. Goes with `set_group_timeout`."""
    return set(distributed_c10d._world.pg_map)


def group_registry() -> dict[str, Any]:
    """The attributes of torch's record of groups, beside which we keep ours: both end together."""
    return vars(distributed_c10d._world)


def all_gather_into(gathered: torch.Tensor, tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool) -> Any:
    """`all_gather_single`, called `all_gather_into_tensor` before torch 2.13. Goes when 2.13 is the oldest torch."""
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    return getattr(dist, name)(gathered, tensor, group=group, async_op=async_op)


# -------------------------------------------------------- torch: private in torch 2.11 to 2.13, and still there in 2.14


def profiler_enabled() -> bool:
    """Whether a profiler records: to record a range costs more than to ask this."""
    return torch.autograd._profiler_enabled()


def under_selective_checkpointing() -> bool:
    """Whether a context of `create_selective_checkpoint_contexts` is active: its two modes have no public name."""
    selective = (checkpoint._CachedTorchDispatchMode, checkpoint._CachingTorchDispatchMode)
    return any(isinstance(mode, selective) for mode in _python_dispatch._get_current_dispatch_mode_stack())


def linear_is_replaced() -> bool:
    """Whether somebody put another function in the place of `functional.linear`, as DeepSpeed's ZeRO-3 does."""
    return torch.nn.functional.linear is not torch._C._nn.linear


def find_hook_owner(model: torch.nn.Module, kind: type[Owner]) -> Owner | None:
    """The object of class `kind` whose method is a forward pre-hook in a model. Goes once torch lists hooks."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return next((owner for owner in owners if isinstance(owner, kind)), None)


def has_gradient_hooks(parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter has hooks of `register_hook`; see `find_hook_owner`."""
    return bool(parameter._backward_hooks)


def reference_counts(tensor: Any) -> tuple[int, ...]:
    """How often a tensor is referred to in C++, its memory, itself in Python, and both for what it is a view of."""
    memory = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    base = () if tensor._base is None else (tensor._base._use_count(), sys.getrefcount(tensor._base))
    return tensor._use_count(), memory, sys.getrefcount(tensor), *base


def write_count(tensor: torch.Tensor) -> int:
    """The number that autograd increases with each write into a tensor's memory."""
    return tensor._version


def storage_identity(tensor: torch.Tensor) -> int:
    """The address of a tensor's storage object. `data_ptr` does not distinguish empty storages."""
    return tensor.untyped_storage()._cdata


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, what a collective under way will have written: read without an operator."""
    local = getattr(tensor, "_local_tensor", tensor)
    return getattr(local, "elem", local)


def fake_tensors() -> Any:
    """torch's module of fake tensors, which have shapes and no memory, and the process group "fake", registered."""
    importlib.import_module("torch.testing._internal.distributed.fake_pg")  # not needed to import hf_usp
    return importlib.import_module("torch._subclasses.fake_tensor")


def scheduler_steps(scheduler: Any) -> int:
    """The steps that a learning-rate scheduler of torch has counted; Accelerate 1.15 reads it too."""
    return scheduler._step_count


def cpu_flash_operators() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Flash attention for CPU, forward and backward. Goes once a public function takes and gives the log-sum-exp."""
    aten = torch.ops.aten
    return aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward


def cuda_flash_operators() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """FlashAttention 2 for CUDA with variable lengths, forward and backward. Goes as `cpu_flash_operators` goes."""
    aten = torch.ops.aten
    return aten._flash_attention_forward.default, aten._flash_attention_backward.default


def cudnn_operators() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Attention by cuDNN, dense, forward and backward. Goes as `cpu_flash_operators` goes."""
    aten = torch.ops.aten
    return aten._scaled_dot_product_cudnn_attention.default, aten._scaled_dot_product_cudnn_attention_backward.default


def efficient_operators() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Memory-efficient attention of xFormers in torch, forward and backward. Goes as `cpu_flash_operators` goes."""
    aten = torch.ops.aten
    return aten._efficient_attention_forward.default, aten._efficient_attention_backward.default


def operator_arguments(operator: Any) -> list[tuple[str, bool]]:
    """The arguments of an operator of `torch.ops`, and whether each has a default. torch has no public list."""
    schema = operator.default._schema
    return [(argument.name, argument.has_default_value()) for argument in schema.arguments]


def get_reshard_state(unit: Any) -> tuple[Any, Any]:
    """Whether an FSDP2 unit frees its parameters after a forward. Goes once FSDPModule has a getter."""
    state = unit._get_fsdp_state()
    return state._auto_reshard_after_forward, getattr(state._fsdp_param_group, "post_forward_mesh_info", None)


def set_reshard_state(unit: Any, before: tuple[Any, Any]) -> None:
    """Put back what `get_reshard_state` returned."""
    state = unit._get_fsdp_state()
    state._auto_reshard_after_forward = before[0]
    if state._fsdp_param_group is not None:
        state._fsdp_param_group.post_forward_mesh_info = before[1]


# ----------------------------------------------------------------------------------- Transformers: read in 5.17 to 5.24


def checkpointing_name() -> str:
    """The name of activation checkpointing in arguments: 5.23 renamed it. Goes when 5.23 is the oldest Transformers."""
    new, models = "activation_checkpointing", importlib.import_module("transformers")
    return new if hasattr(models.PreTrainedModel, f"{new}_enable") else "gradient_checkpointing"


def layer_forward(layer: torch.nn.Module) -> Callable[..., Any]:
    """The forward of a layer's class without the checkpointing that Transformers wraps around it since 5.23."""
    return inspect.unwrap(type(layer).forward, stop=lambda x: x.__code__.co_name != "forward_with_checkpointing")


def checkpoint_function(layer: Any) -> Any:
    """The function that recomputes a checkpointed layer; None without one. It has no public name."""
    return getattr(layer, "_gradient_checkpointing_func", None)


def set_checkpoint_function(layer: Any, function: Callable[..., Any]) -> None:
    """Replace that function on one layer."""
    layer._gradient_checkpointing_func = function


def attention_implementation(config: Any) -> str | None:
    """The value of `attn_implementation` that a model was loaded with: it is an argument, and no public attribute."""
    return getattr(config, "_attn_implementation", None)


def has_attention_interface(model_class: type) -> bool:
    """Whether a model class lets its attention function be chosen."""
    return any(getattr(model_class, f"_supports_{way}", False) for way in ("attention_backend", "sdpa"))


def chunks_from_row_start() -> bool:
    """Whether packed documents' chunks are counted from the row's start: before 5.23. Goes when 5.23 is the oldest."""
    masking_utils = importlib.import_module("transformers.masking_utils")
    return not hasattr(masking_utils, "remap_positions_for_packed_sequence")


def sampling_loop(model: Any) -> Callable[..., Any]:
    """The loop of `generate` that chooses one token a row. Goes once a `custom_generate` function can call it."""
    return model._sample


class MaskPart(NamedTuple):
    """A mask function.

    Attributes:
        function: the function itself.
        name: its full name.
        values: what it has captured, by the names in its factory.
    """

    function: Callable[..., Any]
    name: str
    values: dict[str, Any]


def mask_parts(function: Callable[..., Any]) -> list[MaskPart]:
    """The parts of a mask function made by `and_masks`, else itself. Goes once mask functions can be asked."""
    part = MaskPart(function, function.__qualname__, _captured(function))
    inner = part.values.get("mask_functions", ()) if part.name.startswith("and_masks.") else ()
    return [MaskPart(f, f.__qualname__, _captured(f)) for f in inner] or [part]


def _captured(function: Callable[..., Any]) -> dict[str, Any]:
    code, closure = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    return {} if code is None else dict(zip(code.co_freevars, (c.cell_contents for c in closure or ()), strict=True))


def is_batch_rebalance_sampler(sampler: Any) -> bool:
    """Whether a sampler is that of `train_sampling_strategy="batch_rebalance"`, which 5.17 lacks."""
    trainer = importlib.import_module("transformers.trainer_pt_utils")  # too many imports for `import hf_usp`
    return isinstance(sampler, getattr(trainer, "BatchRebalanceSampler", ()))


# ----------------------------------------------------------------- Accelerate, DeepSpeed, TRL: read in 1.15, 0.19, 1.16


def calling_object() -> Any:
    """`self` of the method that called the caller of this function; None where it is no method.

    Only a trainer of TRL has the reference models that it wraps past `prepare`. Goes once TRL prepares them.
    """
    return sys._getframe(2).f_locals.get("self")


# TRL's methods that gather rewards and rows, and what they call. Go once TRL counts ranks that share a batch once.
SCORING, REWARDS, DEVIATION = "_generate_and_score_completions", "_calculate_rewards", "nanstd"
OWN_REWARDS, GATHER = "_calculate_rewards_from_functions", "gather_object"  # the first is OnlineDPO's
SLICING = "_prepare_training_batch", "_generate_vllm_server", "generate"  # SDPO's, and those of clients of vLLM


def modules_of(owner: Any, method: str, function: str) -> list[Any]:
    """The modules of an object's classes that define that method, as far as they call that function."""
    modules = [sys.modules[kind.__module__] for kind in type(owner).__mro__ if method in vars(kind)]
    return [module for module in modules if hasattr(module, function)]


def is_repeat_sampler(sampler: Any) -> bool:
    """Whether a sampler is TRL's, which repeats chunks of prompts; by its name, for TRL is not imported to ask."""
    return any((kind.__name__, kind.__module__[:4]) == ("RepeatSampler", "trl.") for kind in type(sampler).__mro__)


def prepared_schedulers(accelerator: Any) -> list[Any]:
    """The schedulers that an accelerator has prepared. Goes once a prepared scheduler can be told its steps."""
    return accelerator._schedulers


# Name of the method that gives data loaders their mesh: in Accelerate 1.15 only they ask it under DeepSpeed.
LOADER_MESH = "_prepare_device_mesh"


def is_prepared_loader(data_loader: Any) -> bool:
    """Whether an accelerator has prepared a data loader."""
    return getattr(data_loader, "_is_accelerate_prepared", False)


def axis_sizes(config: Any) -> dict[str, int]:
    """The record of sizes from which a `ParallelismConfig` builds its mesh; may be changed."""
    return config._sizes


def set_axis_size(config: Any, axis: str, size: int) -> None:
    """Set a size in that record and in its attribute `{axis}_size`."""
    config._set_size(axis, size)


def is_zero3_parameter(parameter: torch.Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 keeps a part of this parameter on each rank."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of a parameter before ZeRO-3 sharded it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


# ------------------------------------- flash-attn, -3, -4, kernels: read in 2.7 to 2.8, 3.0, 4.0.0b4 to b36, 0.17


def import_flash_attn() -> tuple[str, Any, Any]:
    """The version of flash-attn, and the functions of `flash_attn_functions`; may fail to import."""
    package = importlib.import_module("flash_attn")
    return package.__version__, *flash_attn_functions(importlib.import_module("flash_attn.flash_attn_interface"))


def flash_attn_functions(interface: Any) -> tuple[Any, Any]:
    """flash-attn's forward and backward that take and give a log-sum-exp, of the package or of a kernel of the Hub."""
    return tuple(getattr(interface, f"_flash_attn_varlen_{way}", None) for way in ("forward", "backward"))  # type: ignore[return-value]


def import_flash_attn_3() -> Any:
    """The namespace of FlashAttention 3's operators: its Python functions changed twice; may fail to import."""
    importlib.import_module("flash_attn_interface")
    return torch.ops.flash_attn_3


def import_flash_attn_4() -> tuple[Any, Any]:
    """FlashAttention 4's forward and backward; may fail to import. They go once public ones take a log-sum-exp."""
    interface = importlib.import_module("flash_attn.cute.interface")
    return getattr(interface, "_flash_attn_fwd", None), getattr(interface, "_flash_attn_bwd", None)


def hub_kernel(repository: str, major: int, download: bool) -> Any:
    """A kernel of the Hub: loaded already, from the Hub's cache, or with `download` from there; may fail."""
    kernels = importlib.import_module("kernels")
    for loaded in kernels.get_loaded_kernels():
        if getattr(loaded.repo_info, "repo_id", None) == repository:
            return loaded.module
    if not download:
        kernels.install_kernel(repository, version=major, local_files_only=True)
    return kernels.get_kernel(repository, version=major)
