"""Ranks that stay alive over many tests: start-up costs seconds, a test milliseconds.

`Ranks(n).run(function, *args)` runs `function(*args)` on n processes of one gloo group and returns their results, or
raises with the traceback of the first rank that failed, or names a rank that died, whoever noticed it first. A
rank that does not answer in time takes the whole pool down; the next call starts a fresh one. Functions must be
importable from the test module (no closures).
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import numpy

# Imported once in the fork server, so that a new process costs a fork and not an import of torch. TRL, which changes
# Transformers when it is imported, and DeepSpeed, which then looks for its device, are left to those who use them.
PRELOAD = [
    "torch",
    "torch.distributed",
    "torch._dynamo",
    "transformers",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "accelerate",
    "datasets",
    "peft",
    "hf_usp",
]
TIMEOUT = 120.0
GRACE = 5.0


class RankError(AssertionError):
    """A rank raised, died or hung; the message holds its traceback."""


class Ranks:
    def __init__(self, size: int) -> None:
        self.size = size
        self._workers: list[Any] = []
        self._pipes: list[Any] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT, **keywords: Any) -> list[Any]:
        """Results of `function(*args, **keywords)` on ranks 0 .. size - 1."""
        if not self._workers:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args, keywords))
        results: dict[int, Any] = {}
        failure, left = "", timeout
        died = ""
        while len(results) < self.size:
            ready = wait([p for r, p in enumerate(self._pipes) if r not in results], timeout=left)
            if not ready:
                missing = [r for r in range(self.size) if r not in results]
                self.stop()
                raise RankError(died or failure or f"ranks {missing} did not answer within {timeout} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    ok, value = False, "the process died"
                    died = died or f"rank {rank} of {self.size}: {value}"
                results[rank] = value
                if not ok:
                    # The others may wait for this rank in a collective.
                    failure, left = failure or f"rank {rank} of {self.size}: {value}", GRACE
        if failure:
            self.stop()
            raise RankError(died or failure)
        return [results[rank] for rank in range(self.size)]

    def reset(self) -> None:
        """Bring processes that are alive back to the state in which they started."""
        try:
            if self._workers:
                self.run(_reset, timeout=GRACE * 4)
        except RankError:
            pass  # they are stopped; the next call starts others

    @property
    def alive(self) -> bool:
        """Whether processes wait for work; after a failure the next call starts new ones."""
        return bool(self._workers)

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(rank, self.size, port, theirs), daemon=True)
            worker.start()
            theirs.close()
            self._workers.append(worker)
            self._pipes.append(ours)

    def stop(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.kill()
            worker.join()
        for pipe in self._pipes:
            pipe.close()
        self._workers, self._pipes = [], []


def _serve(rank: int, size: int, port: int, pipe: Any) -> None:
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in here.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", ACCELERATE_USE_CPU="true")
    if sys.version_info < (3, 14):  # workers of loaders start as a user's do, and do not import everything again
        multiprocessing.set_start_method("fork", force=True)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    gc.freeze()  # else each collection of garbage walks through all that was imported: 0.3 s
    strict_warnings()
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    _STARTED.update(_state())
    while True:
        try:
            function, args, keywords = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*args, **keywords)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


# State of this process when it started.
_STARTED: dict[str, Any] = {}


def _state() -> dict[str, Any]:
    """Of this process: what a test may change and the next one would see."""
    import torch
    from transformers.utils import logging

    return {
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "folder": os.getcwd(),
        "path": list(sys.path),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "verbosity": logging.get_verbosity(),
        "constants": {
            name: {key: value for key, value in vars(module).items() if key.isupper()}
            for name, module in list(sys.modules.items())
            if name.split(".")[0] == "hf_usp"
        },
    }


def _reset() -> None:
    """Undo in this rank what the tests of a module left behind; process groups stay, for `mesh.kept` keeps them."""
    import torch
    import torch.distributed as dist
    from accelerate.state import AcceleratorState, GradientState
    from transformers.utils import logging

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.clear()
    os.environ.update(_STARTED["environment"])
    warnings.resetwarnings()
    warnings.filters[:] = _STARTED["warnings"]
    os.chdir(_STARTED["folder"])
    sys.path[:] = _STARTED["path"]
    torch.set_default_dtype(_STARTED["dtype"])
    torch.set_num_threads(_STARTED["threads"])
    torch.use_deterministic_algorithms(False)
    torch.set_grad_enabled(True)
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    torch._dynamo.reset()
    logging.set_verbosity(_STARTED["verbosity"])
    for name, constants in _STARTED["constants"].items():
        vars(sys.modules[name]).update(constants)
    gc.collect()
    dist.barrier()


def strict_warnings() -> None:
    """Warnings are errors in the ranks too; what upstream does to itself is listed with its reason."""
    warnings.simplefilter("error")
    # torch.distributed and torch.compile warn about their own internals when first used.
    warnings.filterwarnings("ignore", module=r"torch\..*", category=FutureWarning)
    # torch 2.13 looks at the gradients of a compiled region's inputs.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    # Accelerate 1.15 takes "dp_shard_cp" from the root mesh, for its own FSDP2 as for ours.
    warnings.filterwarnings("ignore", message="Slicing a flattened dim from root mesh")
    # PEFT 0.21 and TRL 1.16 use names that Transformers 5.23 has deprecated.
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing")
