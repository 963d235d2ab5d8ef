"""Options that save memory: one by one, as a dict, or "auto", for which all ranks agree on what memory there is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..distributed.comm import all_gather_objects
from ..distributed.mesh import UspMesh
from ..errors import UspConfigError, UspModelError
from ..memory.chosen import ChosenMemory, chosen_memory
from ..memory.chunked_loss import ChunkedLoss, chunked_loss
from ..memory.host_arena import MEMINFO, available_memory
from ..memory.tiled_layer import tile_layers
from ..memory.tiled_norm import tile_norms
from ..models.traits import inspect_model
from ..planner.hardware import MACHINES
from ..planner.request import AUTO_CHUNK, USABLE, USABLE_HOST, PlanRequest, shape_of
from ..planner.search import LOSS_CHUNK
from ..planner.workload import Degrees, TrainingStep
from ..utils.validation import check_folder, check_positive_int, check_switches, size_from_environment
from .ulysses_degree import machine_of

AUTO = "auto"
# Options that a dict may hold, by their own names, and what they are without it.
MEMORY_OPTIONS: dict[str, Any] = {
    "loss_chunk_size": None,
    "mlp_chunk_size": None,
    "layer_chunk_size": None,
    "head_groups": None,
    "keep_attention": False,
    "offload_checkpoints": False,
}


def memory_options(memory: object, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that save memory: those `given` one by one, or those of `memory`.

    Raises:
        UspConfigError: another word than "auto", a key that is no such option, or options beside `memory`.
    """
    if memory is None:
        return dict(given)
    if memory != AUTO and not isinstance(memory, Mapping):
        raise UspConfigError(
            f"memory={memory!r:.100}",
            rule="memory is 'auto', or a dict of options",
            remedy="pass memory='auto', or memory={'layer_chunk_size': 4096, 'head_groups': 4}, say",
        )
    beside = [f"{name}={value!r:.100}" for name, value in given.items() if value != MEMORY_OPTIONS[name]]
    if beside:
        raise UspConfigError(
            f"memory={memory!r:.100} and {', '.join(beside)}",
            rule="memory says it all, or each option is given by itself",
            remedy="put the option into the dict, as in memory={'layer_chunk_size': 4096}, or leave out memory",
        )
    if not isinstance(memory, Mapping):
        return dict(MEMORY_OPTIONS)
    unknown = [name for name in memory if name not in MEMORY_OPTIONS]
    if unknown:
        raise UspConfigError(
            f"memory with the key {unknown[0]!r:.100}",
            rule=f"memory is 'auto', or a dict of {', '.join(MEMORY_OPTIONS)}",
            remedy="take the name of such an option",
        )
    return MEMORY_OPTIONS | dict(memory)


def validate_memory_options(
    options: Mapping[str, Any], memory: object, gather_outputs: bool | None, ranks: int
) -> None:
    """Raise `UspConfigError` for options of `MEMORY_OPTIONS` that do not fit each other, or what is asked for beside.

    ranks: of a mesh.
    """
    _check_auto(memory, gather_outputs)
    _validate_chunks(options["loss_chunk_size"], options["mlp_chunk_size"], gather_outputs)
    _validate_layers(options["layer_chunk_size"], options["head_groups"], options["keep_attention"], ranks)
    _validate_offload(options["offload_checkpoints"])


def _check_auto(memory: object, gather_outputs: object) -> None:
    """Raise `UspConfigError` for logits that are both left out and gathered."""
    if memory == AUTO and gather_outputs:
        raise UspConfigError(
            "memory='auto' with gather_outputs=True",
            rule="with memory='auto' the loss is computed in chunks, which leaves no logits to be gathered",
            remedy="choose one: memory='auto' for training, gather_outputs for predict and compute_metrics",
        )


def _validate_chunks(loss_chunk_size: int | None, mlp_chunk_size: int | None, gather_outputs: bool | None) -> None:
    """Raise `UspConfigError` for empty chunks, and for logits that are both left out and gathered."""
    check_positive_int(loss_chunk_size=loss_chunk_size, mlp_chunk_size=mlp_chunk_size)
    if loss_chunk_size is not None and gather_outputs:
        raise UspConfigError(
            f"loss_chunk_size={loss_chunk_size} with gather_outputs=True",
            rule="a loss in chunks leaves no logits to be gathered",
            remedy="choose one: loss_chunk_size for training, gather_outputs for predict and compute_metrics",
        )


def _validate_layers(layer_chunk_size: int | None, head_groups: int | None, keep_attention: object, ranks: int) -> None:
    """Raise `UspConfigError` for empty chunks, what needs chunks without them, and chunks where nothing is sharded."""
    check_positive_int(layer_chunk_size=layer_chunk_size, head_groups=head_groups)
    if head_groups is not None and layer_chunk_size is None:
        raise UspConfigError(
            f"head_groups={head_groups} without layer_chunk_size",
            rule="attention computes in groups of heads inside layers that compute in chunks",
            remedy="pass layer_chunk_size=4096, too, or leave out head_groups",
        )
    if not isinstance(keep_attention, bool):
        check_positive_int(required=True, keep_attention=keep_attention)
    if keep_attention and layer_chunk_size is None:
        raise UspConfigError(
            f"keep_attention={keep_attention} without layer_chunk_size",
            rule="attention's output is kept of layers that compute in chunks",
            remedy="pass layer_chunk_size=4096, too, or leave out keep_attention (checkpointed layers keep it by "
            "hf_usp.save_attention_outputs())",
        )
    if layer_chunk_size is not None and ranks == 1:
        raise UspConfigError(
            f"layer_chunk_size={layer_chunk_size} where one rank has whole sequences",
            rule="a layer in chunks is taken apart at its sharded attention",
            remedy="leave out layer_chunk_size, or share sequences by cp_size=2 or more",
        )


def _validate_offload(offload_checkpoints: object) -> None:
    """Raise `UspConfigError` for what is neither a switch nor a folder that can be written into."""
    if isinstance(offload_checkpoints, str):
        check_folder(offload_checkpoints, "offload_checkpoints")
    else:
        check_switches(offload_checkpoints=offload_checkpoints)


def choose_memory(
    model: PreTrainedModel,
    mesh: UspMesh | None,
    device: torch.device,
    *,
    step: TrainingStep | None = None,
    machine: str | None = None,
    dp_shard: int = 1,
    tp: int = 1,
) -> None:
    """Save memory in a way that is chosen for each batch. Every process of the world calls it; again changes nothing.

    Args:
        model: the model.
        mesh: the ranks that share a sequence; None: one.
        device: where it computes.
        step: dtypes, optimizer and sharding of the run. Default: AdamW in the dtype of the weights, all of them on
            every rank.
        machine: preset of `hf-usp plan` or file of `hf-usp check`, whose memory is taken on a CPU.
        dp_shard: data-parallel ranks that share parameters.
        tp: tensor-parallel ranks.

    Raises:
        UspError: a model whose sizes the planner does not know, or whose sequences are sharded inside it; a device
            whose memory is not known; on every rank.
    """
    if chosen_memory(model) is not None:
        return
    if inspect_model(model).backbone.inside:
        raise UspModelError(
            f"memory='auto' with {type(model).__name__}, whose sequences are sharded inside it",
            rule="with memory='auto' the local length of a batch is known before the model runs",
            remedy="fix the options by hand, as in memory={'mlp_chunk_size': 4096}",
        )
    shape = shape_of(model.config)
    budget, host = _agreed_memory(device, machine)
    found = machine_of(machine, device) or MACHINES["h100-nvlink"]  # the order of ways, not their seconds
    kernel = next(iter(found.kernels))
    what = PlanRequest(
        type(model).__name__,
        shape,
        found,
        tokens=1,
        gpus=1,
        budget=budget,
        allow_offload=device.type != "cpu",  # what is in host memory there is there already
        layer_chunk_size=AUTO_CHUNK,
        keep_attention=True,
        auto=True,
        like=_with_share(step or _step_of(model), model, kernel),
        host_budget=host,
    )
    ulysses, ring = (1, 1) if mesh is None else (mesh.ulysses_degree, mesh.ring_degree)
    if chunked_loss(model) is None:
        ChunkedLoss(model, LOSS_CHUNK)
    if ulysses * ring > 1:
        layers = tile_layers(model, AUTO_CHUNK, 1)
        tile_norms(model, AUTO_CHUNK, but_of=layers)
    telling = mesh is None or mesh.ring_rank == mesh.ulysses_rank == 0
    ChosenMemory(model, what, Degrees(ulysses, ring, tp, dp_shard), telling)


def _step_of(model: PreTrainedModel) -> TrainingStep:
    element = model.dtype.itemsize
    return TrainingStep(1, element=element, optimizer=2 * element, gradients=element, shard_params=False)


def _with_share(step: TrainingStep, model: PreTrainedModel, kernel: str) -> TrainingStep:
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, wanted in sizes if wanted) / max(1, sum(size for size, _ in sizes))
    return replace(step, kernel=kernel, trained=trained)


def _agreed_memory(device: torch.device, machine: str | None) -> tuple[float, float]:
    """Bytes of device and host that every rank may use: the smallest of all ranks; all of them call this."""
    try:
        mine: tuple[float, float] | UspConfigError = _memory(device, machine)
    except UspConfigError as refusal:
        mine = refusal
    said = all_gather_objects(mine)
    for rank, word in enumerate(said):
        if isinstance(word, UspConfigError):
            raise UspConfigError(f"rank {rank}: {word.found}", rule=word.rule, remedy=word.remedy)
    return min(device for device, _ in said), min(host for _, host in said)


def _memory(device: torch.device, machine: str | None) -> tuple[float, float]:
    """Of this rank: of the device, and its share of the host's."""
    ranks = size_from_environment("LOCAL_WORLD_SIZE", os.environ, least=1)
    given = None if machine is None else machine_of(machine, device)
    if device.type == "cpu":
        if given is not None:
            return given.memory * USABLE, given.host_memory * USABLE_HOST / ranks
        available = _available()
        return available * USABLE / ranks, available * USABLE_HOST / ranks
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        raise _unknown(f"a {device.type}")
    free, _ = module.mem_get_info(device)
    return (free + module.memory_reserved(device)) * USABLE, _available() * USABLE_HOST / ranks


def _available(path: str = MEMINFO) -> int:
    """Bytes of host memory that programs can still take."""
    available = available_memory(path)
    if available is None:
        raise _unknown("a host")
    return available


def _unknown(whose: str) -> UspConfigError:
    return UspConfigError(
        f"memory='auto' on {whose} that does not say how much memory it has",
        rule="the way is chosen by the memory that there is",
        remedy="on a CPU name the file of hf-usp check as machine=; else fix the options by hand, as in "
        "memory={'layer_chunk_size': 4096}",
    )
