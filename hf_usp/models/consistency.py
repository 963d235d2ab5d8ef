"""A model has to be the same on all ranks: compared when it is prepared; its weights, at its first forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..batch.fingerprint import checksum, hashed, words
from ..compat import is_zero3_parameter
from ..distributed.agreement import named
from ..distributed.comm import all_gather
from ..distributed.failures import on_every_rank
from ..distributed.mesh import UspMesh
from ..errors import UspModelError

# Settings of a configuration that may differ: where a node keeps its files, what wrote them.
FREE = ("_name_or_path", "transformers_version", "_commit_hash")
LOOKED_AT = 1 << 16  # words of a parameter, evenly spread


def describe_model(model: PreTrainedModel) -> dict[str, Any]:
    """Properties that do not depend on wrappers: class, configuration, names, dtypes, checkpointing."""
    parameters = list(model.named_parameters())
    found = {
        "model": type(model).__name__,
        "dtypes": sorted({str(parameter.dtype) for _, parameter in parameters}),
        "number of parameters": len(parameters),
        "checksum of their names": hashed(repr([name for name, _ in parameters])),
        "checksum of those to be trained": hashed(repr([name for name, p in parameters if p.requires_grad])),
        # `is_gradient_checkpointing` until Transformers 5.23, `is_activation_checkpointing` from 5.24: both read this.
        "gradient_checkpointing": any(getattr(module, "gradient_checkpointing", False) for module in model.modules()),
    }
    return found | {f"config.{name}": value for name, value in _flat("", model.config.to_dict())}


def check_weights(model: PreTrainedModel, mesh: UspMesh, device: torch.device) -> None:
    """Raise `UspModelError` on every rank of the mesh unless all hold the same weights, as far as they hold them whole.

    Compared are up to 65,536 words of every parameter. Those of which each rank has a part are left out (FSDP2, tensor
    and expert parallelism, ZeRO-3), and those without values.
    """
    assert mesh.group is not None
    total = torch.zeros((), dtype=torch.int64, device=device)
    for name, parameter in model.named_parameters():
        if not is_part(parameter):
            held = words(parameter)
            some = held[:: max(1, len(held) // LOOKED_AT)]
            total = total + checksum(some, hashed(name)).to(device)
    sums = all_gather(total.view(1), mesh.group).flatten().tolist()
    most = max(sums, key=sums.count)
    if len(set(sums)) > 1:
        others = [rank for rank, found in zip(mesh.ranks, sums, strict=True) if found != most]
        raise on_every_rank(
            UspModelError(
                f"{type(model).__name__} with other weights on {named(others)} than on the rest of its "
                "context-parallel group",
                rule="all ranks that share a sequence compute with the same weights",
                remedy="load the same checkpoint on every rank, or seed all ranks equally before a model is made at "
                "random (torch.manual_seed)",
            )
        )


def is_part(parameter: Tensor) -> bool:
    """Whether each rank has a part of a parameter, or none of its values."""
    return parameter.is_meta or hasattr(parameter, "device_mesh") or is_zero3_parameter(parameter)


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Nested dicts as `text_config.hidden_size`."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, entry in value.items():
        if key not in FREE:
            yield from _flat(f"{name}.{key}".lstrip("."), entry)
