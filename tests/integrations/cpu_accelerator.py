"""Accelerate offers FSDP2 and DeepSpeed only where it sees an accelerator. Here it is told that it does.

The device stays the CPU and the backend gloo; what is wrapped around the model is the real thing.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import hf_usp

from ..harness import fresh_accelerate


@contextmanager
def cpu_as_accelerator() -> Iterator[None]:
    """FSDP2 of Accelerate on the CPU, for the length of the block."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    stock = PartialState._prepare_backend, PartialState.set_device
    use_cpu = os.environ.pop("ACCELERATE_USE_CPU")
    fresh_accelerate()
    os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    try:
        yield
    finally:
        PartialState._prepare_backend, PartialState.set_device = stock
        os.environ["ACCELERATE_USE_CPU"] = use_cpu
        del os.environ["ACCELERATE_BYPASS_DEVICE_MAP"]
        fresh_accelerate()


@contextmanager
def cpu_deepspeed() -> Iterator[None]:
    """DeepSpeed through Accelerate on the CPU, without compiling anything, for the length of the block."""
    stock = dict(os.environ)
    # Build variables also serve an installation from source; DeepSpeed picks its device when it is first imported.
    os.environ.update(DS_ACCELERATOR="cpu", DS_BUILD_OPS="0")
    with warnings.catch_warnings():
        # torch's inductor, which DeepSpeed imports for an optimizer, uses what torch has deprecated.
        warnings.filterwarnings("ignore", message=r"`torch\.jit")
        import deepspeed.ops

        linear = torch.nn.functional.linear  # which ZeRO-3 replaces, for every model there is
        # Its all-reduce through shared memory would be compiled at first use; gloo does as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        try:
            with cpu_as_accelerator():
                yield
        finally:
            torch.nn.functional.linear = linear
            os.environ.clear()
            os.environ.update(stock)


def fsdp2(model: Any, sizes: dict[str, Any], precision: str = "no", offload: bool = False, **plugin: Any) -> Any:
    """An accelerator with FSDP2 that wraps every layer."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

    wrapping = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[type(model.model.layers[0]).__name__],
        # Pinning memory needs a GPU.
        cpu_offload=CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy(),
        **plugin,
    )
    config = hf_usp.UspParallelismConfig(**sizes)
    return Accelerator(fsdp_plugin=wrapping, parallelism_config=config, mixed_precision=precision)
