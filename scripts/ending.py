"""How a script that trained on CPU processes ends: after the threads of their groups have let go of all tensors.

A thread of a gloo group that lets go of its last tensor while Python takes itself apart aborts the process
(pytorch/pytorch#179291): one run in some hundred ends with an error after its last line. Destroyed groups wait for
their threads, but not where something else holds the group (a module of DeepSpeed, which the Trainer imports, does).
"""

from __future__ import annotations

import time

import torch.distributed as dist

# Threads need a moment of the interpreter's lock; half a second is a thousand times what they take.
PAUSE = 0.5


def end_process_groups() -> None:
    """Destroy all groups of this process. Without groups it does nothing."""
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(PAUSE)
