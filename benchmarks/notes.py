"""The lines at the top of every result file: command, machine, versions."""

from __future__ import annotations

import os
import platform

import torch

import hf_usp


def machine_notes(command: str) -> dict[str, str]:
    """Command, hardware and versions, in words."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown")
    return {
        "command": f"`{command}`",
        "machine": f"{os.cpu_count()} cores, {cpu}, {platform.system()}",
        "versions": f"torch {torch.__version__}, hf_usp {hf_usp.__version__}, Python {platform.python_version()}",
    }
