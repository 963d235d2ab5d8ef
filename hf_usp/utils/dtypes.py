"""Dtypes: their names in commands, and autocast around functions that choose their own.

Autocast is what `TrainingArguments(bf16=True)` turns on for weights in fp32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..errors import UspConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def check_dtype(name: str) -> None:
    """Raise `UspConfigError` for a name that is not in `DTYPES`."""
    if name not in DTYPES:
        raise UspConfigError(
            f"dtype {name!r}", rule=f"a dtype is one of {', '.join(DTYPES)}", remedy="pass --dtype bf16, say"
        )


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype of matrix products on the tensor's device, if autocast is on there."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast tensors as autocast casts the inputs of sdpa: all to its dtype, except fp64.

    Rotary embeddings in fp32 leave queries and keys in fp32, values come in bf16 from their projection.
    """
    dtype = autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Without autocast on a device: casts are made by hand, or wanted by nobody."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()
