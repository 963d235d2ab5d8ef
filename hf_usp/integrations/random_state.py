"""Ranks that share a batch draw the same random numbers from `prepare` on: those of one data-parallel process.

The Trainer seeds all ranks alike. Trainers that sample completions seed each process by its index, because in data
parallelism each has prompts of its own (`set_seed(seed, device_specific=True)`). The ranks of group g then take the
state of process g, which would have the rows of that group without context parallelism.
"""

from __future__ import annotations

import pickle
import random

import numpy as np
import torch
import torch.distributed as dist

from ..distributed.comm import all_gather_objects


def share_random_state(group_size: int) -> None:
    """Where ranks of a group differ, give each group the state of the process of its number; all processes call this.

    group_size: consecutive ranks that share a batch.
    """
    states = all_gather_objects(_state())
    if any(len(set(states[first : first + group_size])) > 1 for first in range(0, len(states), group_size)):
        _set_state(states[dist.get_rank() // group_size])


def _state() -> bytes:
    device = torch.get_device_module().get_rng_state().numpy() if torch.accelerator.is_available() else None
    return pickle.dumps((torch.get_rng_state().numpy(), random.getstate(), np.random.get_state(), device))


def _set_state(state: bytes) -> None:
    cpu, python, numpy, device = pickle.loads(state)
    torch.set_rng_state(torch.from_numpy(cpu))
    random.setstate(python)
    np.random.set_state(numpy)
    if device is not None:
        torch.get_device_module().set_rng_state(torch.from_numpy(device))
