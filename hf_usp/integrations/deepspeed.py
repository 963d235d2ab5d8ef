"""DeepSpeed's ZeRO around the mesh: `Accelerator(deepspeed_plugin=...)`, `TrainingArguments(deepspeed=...)`.

ZeRO averages gradients over all processes, those that share a sequence included, which is what the backward of a
sharded loss expects (`loss.py`). So DeepSpeed is told nothing of our mesh: to its engine all ranks are data parallel.
Its own sequence parallelism would sum over the ranks of a sequence instead of averaging.

Two things follow. Its `train_batch_size` counts a sequence once for each rank that shares it (that number is only
checked and logged). And Accelerate's dataloaders, which under DeepSpeed look at one axis of a mesh alone, the one named
"tp", get a mesh whose axis of this name holds the ranks that share a batch.
"""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType

from ..compat import LOADER_MESH
from ..distributed.mesh import DeviceMesh, batch_mesh
from ..errors import UspConfigError
from ..utils.patches import AttributePatches


def under_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def prepare_for_deepspeed(accelerator: Accelerator, cp_size: int, tp_size: int, patches: AttributePatches) -> None:
    """Let the dataloaders of this accelerator give all ranks of a sequence the same batch.

    Raises `UspConfigError` for settings of DeepSpeed that do not go with a mesh of ours.
    """
    check_settings(accelerator.deepspeed_plugin.deepspeed_config, accelerator.num_processes, cp_size, tp_size)
    meshes: list[DeviceMesh] = []

    def device_mesh() -> DeviceMesh:
        if not meshes:
            meshes.append(batch_mesh(accelerator.device.type, cp_size))
        return meshes[0]

    patches.set(accelerator, LOADER_MESH, device_mesh)


def check_settings(settings: dict[str, Any], world: int, cp_size: int, tp_size: int) -> None:
    """Refuse a DeepSpeed config that does not fit `world` processes of which every `cp_size` share a sequence."""
    autotp = settings.get("tensor_parallel", {}).get("autotp_size", 0)
    if tp_size > 1 or autotp > 1:
        raise UspConfigError(
            f"tensor parallelism (tp_size={tp_size}, autotp_size={autotp}) under DeepSpeed with cp_size={cp_size}",
            rule="ZeRO shards over all processes, and those that share a sequence are neighbours",
            remedy="use a larger cp_size instead, or FSDP2 (DistributedConfig(tp_size=..., fsdp_size=...))",
        )
    for name in ("sequence_parallel_size", "data_parallel_size"):
        if name in settings:
            raise UspConfigError(
                f"{name}={settings[name]} in the DeepSpeed config with cp_size={cp_size}",
                rule="gradients are averaged over all processes; DeepSpeed would sum over its own sequence-parallel "
                "ranks",
                remedy=f"leave {name} out: UspParallelismConfig(cp_size=...) says it all",
            )
    micro, steps = (settings.get(n) for n in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"))
    total = settings.get("train_batch_size")
    sizes = [x for x in (micro, steps, total) if isinstance(x, int)]
    if len(sizes) == 3 and total != sizes[0] * sizes[1] * world:
        raise UspConfigError(
            f"train_batch_size={total} in the DeepSpeed config, with micro batches of {micro} and {steps} step(s) of "
            f"accumulation on {world} processes with cp_size={cp_size}",
            rule=f"DeepSpeed counts a row on each of the {cp_size} ranks that share it: {micro} x {steps} x {world}",
            remedy='write "train_batch_size": "auto" or leave it out; the rows of an optimizer step are '
            f"{micro} x {steps} x {world // cp_size}",
        )
