"""Starting the scripts as a user does, and reading what they logged."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from ..ranks import PRELOAD

ROOT = Path(__file__).parents[2]
TINY_LLAMA = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}


def start(program: str, *flags: str, timeout: float = 170) -> subprocess.CompletedProcess[str]:
    """Run `python PROGRAM FLAGS` from the root of the repository."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *program.split(), *flags]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launchers pass it on to the ranks
        output, _ = process.communicate(timeout=30)
        raise AssertionError(f"{command} took more than {timeout} s:\n{output}") from None
    return subprocess.CompletedProcess(command, process.returncode, output)


def alone(script: str, *flags: str, timeout: float = 170) -> subprocess.CompletedProcess[str]:
    """`python SCRIPT FLAGS` in a process that has torch and Transformers imported already: 6 s less of CPU time."""
    return _forked([{}], script, flags, timeout)


def several(processes: int, script: str, *flags: str, timeout: float = 170) -> subprocess.CompletedProcess[str]:
    """The same in processes that are told their ranks as by `torchrun`; they end when one of them fails.

    Few tests start the launchers themselves, where every process imports torch and Transformers: 8 s of CPU time each.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        common = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_PORT": probe.getsockname()[1]}
    ranks = [{**common, "MASTER_ADDR": "127.0.0.1", "RANK": r, "LOCAL_RANK": r} for r in range(processes)]
    return _forked(ranks, script, flags, timeout)


def _forked(
    environments: list[dict[str, Any]], script: str, flags: tuple[str, ...], timeout: float
) -> subprocess.CompletedProcess[str]:
    """One process for each environment; their output, and the exit code of the first that fails."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(rank) for rank in range(len(environments))]
        processes = [
            context.Process(target=_run, args=(script, flags, str(output), environment))
            for output, environment in zip(outputs, environments, strict=True)
        ]
        for process in processes:
            process.start()
        left, code, end = list(processes), 0, time.monotonic() + timeout
        while left and wait([process.sentinel for process in left], timeout=max(0.0, end - time.monotonic())):
            left = [process for process in left if process.is_alive()]
            failed = next((process.exitcode for process in processes if process.exitcode), 0)
            if failed and not code:
                code, end = failed, time.monotonic() + 5  # launchers end the others as well
        for process in left:
            process.kill()
            process.join()
        printed = "".join(output.read_text() for output in outputs if output.exists())
        assert code or not left, f"{script} {flags} took more than {timeout} s:\n{printed}"
        return subprocess.CompletedProcess([script, *flags], code, printed)


def _run(script: str, flags: tuple[str, ...], output: str, environment: dict[str, Any]) -> None:
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    os.environ.update({name: str(value) for name, value in environment.items()})
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # as in `ranks._serve`
    sys.argv = [script, *flags]
    if script.startswith("-m "):
        runpy.run_module(script[3:], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str((ROOT / script).parent))
        runpy.run_path(script, run_name="__main__")


def succeeded(result: subprocess.CompletedProcess[str]) -> str:
    """The output of a run, which must have ended well."""
    assert result.returncode == 0, result.stdout
    return result.stdout


def steps(folder: Path) -> list[dict[str, Any]]:
    """One entry per logged training step: loss, grad_norm, ..."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def write_inputs(folder: Path) -> list[str]:
    """A tiny fresh model and three documents of different length; returns the flags that name them."""
    (folder / "model.json").write_text(json.dumps(TINY_LLAMA))
    texts = folder / "texts"
    texts.mkdir()
    for name, count in (("a", 60), ("b", 25), ("c", 90)):
        (texts / f"{name}.txt").write_text(" ".join(f"{name}{i * i % 97}" for i in range(count)))
    common = "--use_cpu --max_steps 2 --logging_steps 1 --per_device_train_batch_size 2 --report_to none --seed 3"
    return ["--config_name", str(folder / "model.json"), "--train_file", str(texts), *common.split()]
