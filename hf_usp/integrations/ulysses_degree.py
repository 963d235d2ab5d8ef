"""The ulysses degree for `ulysses_degree=None`: hardware of all ranks is gathered, so all ranks choose the same."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from accelerate.utils import gather_object

from ..errors import UspConfigError
from ..planner import choose_degree, find_machine
from ..planner.hardware import MACHINES, Machine, recognised
from ..utils.validation import size_from_environment

logger = logging.getLogger(__name__)


def chosen_degree(config: Any, model: Any, device: torch.device, ranks: int) -> int:
    """The ulysses degree for a config without one; the same on every rank of the `ranks`, which all call this.

    Raises `UspConfigError` on every rank where one of them cannot read the machine's file, or the model has no heads.
    """
    known = gather_object([_known(config, device, ranks)])
    for rank, word in enumerate(known):
        if isinstance(word, UspConfigError):
            raise UspConfigError(f"rank {rank}: {word.found}", rule=word.rule, remedy=word.remedy)
    first = known[0][1]
    alike = all(machine == first for _, machine in known)
    degree, reason = choose_degree(
        model.config,
        first if alike else None,
        cp_size=config.cp_size,
        tp_size=config.tp_size,
        ranks=ranks,
        node=min(node for node, _ in known),
        tokens=config.sequence_length,
    )
    logger.info("usp: %s", reason)
    return degree


def _known(config: Any, device: torch.device, ranks: int) -> tuple[int, Machine | None] | UspConfigError:
    """Ranks of this node and its machine, or the refusal of either, to be told to all ranks."""
    try:
        node = config.ranks_per_node or size_from_environment("LOCAL_WORLD_SIZE", os.environ, default=0) or ranks
        return node, machine_of(config.machine, device)
    except UspConfigError as refusal:
        return refusal


def machine_of(name: str | None, device: torch.device) -> Machine | None:
    """By its name or file, else by the device's name; None: unknown."""
    if name is None:
        if device.type == "cpu":
            return MACHINES["cpu"]
        name = recognised(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if name is None else find_machine(name)
