"""The environment of one rank: host, device, versions, sources, kernels."""

from __future__ import annotations

import os
import platform
import socket
from typing import Any

import torch

from ...compat import installed_version, sources
from ...kernels import Request, Softmax, kernel_report

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "hf_usp",
    "numpy",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "kernels",
    "triton",
    "deepspeed",
    "trl",
    "peft",
)


def facts(device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, Any]:
    """Of this rank, as plain values."""
    versions: dict[str, str | None] = {"Python": platform.python_version(), "hf_usp sources": sources()}
    versions |= {package: installed_version(package) for package in PACKAGES}
    name, memory = platform.processor() or platform.machine(), 0
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
        versions["CUDA"] = torch.version.cuda
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    elif hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "device": f"{device.type} {name}",
        "device_index": device.index if device.type == "cuda" else None,
        "memory": memory,
        "versions": versions,
        "kernels": kernel_report(Request(device, dtype, head_dim, head_dim, Softmax(head_dim**-0.5))),
    }
