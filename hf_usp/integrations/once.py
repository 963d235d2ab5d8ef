"""`once`: a function that runs on one rank of those that share a batch; the others get its result."""

from __future__ import annotations

import functools
import inspect
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate.state import AcceleratorState, is_initialized

from ..distributed.comm import broadcast_object
from ..distributed.failures import on_every_rank
from ..distributed.mesh import UspMesh, consecutive_group
from ..errors import UspConfigError, UspRankError

Function = TypeVar("Function", bound=Callable[..., Any])


def once(function: Function, mesh: UspMesh | None = None) -> Function:
    """A function that runs on the first rank of those that share a batch, whose result all of them return.

    For what would cost as often as there are ranks, or differ between them: a reward function that asks a judge over a
    network, a rollout, a tool. All ranks call it at the same place. Where it raises, all of them raise.

    Args:
        function: the function. Its result can be pickled. It keeps its name, by which TRL logs rewards.
        mesh: the ranks. Default: those that share a batch under the `UspParallelismConfig` of this process's
            accelerator, asked for at each call; without one the function runs as it is.

    Raises:
        UspConfigError: an asynchronous function.
        UspRankError: at a call, on the ranks that wait, if the function fails on the first rank.
    """
    if inspect.iscoroutinefunction(function):
        raise UspConfigError(
            f"once({getattr(function, '__name__', function)}), an asynchronous function",
            rule="ranks exchange results in one order; asynchronous functions end in any",
            remedy="pass a function that returns its result (asyncio.run(...) inside it)",
        )

    @functools.wraps(function)
    def on_first_rank(*args: Any, **kwargs: Any) -> Any:
        ranks, group = _ranks_of(mesh)
        if group is None:
            return function(*args, **kwargs)
        said: Any = None
        problem: Exception | None = None
        if dist.get_rank() == ranks[0]:
            try:
                said = pickle.dumps((True, function(*args, **kwargs)))
            except Exception as raised:  # the others wait
                problem = raised
                said = pickle.dumps((False, f"{type(raised).__name__}: {raised}"))
        said = broadcast_object(said, ranks[0], group)
        if problem is not None:
            raise on_every_rank(problem)
        fine, result = pickle.loads(said)
        if not fine:
            raise on_every_rank(
                UspRankError(
                    f"{getattr(function, '__name__', 'a function')} failed on rank {ranks[0]}, which runs it for this "
                    f"one: {result}",
                    rule="a function that is wrapped in hf_usp.once runs on the first rank of those that share a batch",
                    remedy="solve what that rank reports",
                )
            )
        return result

    return on_first_rank  # type: ignore[return-value]


def _ranks_of(mesh: UspMesh | None) -> tuple[tuple[int, ...], dist.ProcessGroup | None]:
    """The ranks that share this one's batch, and their group; None for one rank."""
    if mesh is not None:
        return mesh.ranks, mesh.group
    config: Any = AcceleratorState().parallelism_config if is_initialized() else None
    if config is None or not hasattr(config, "ulysses_degree") or config.cp_size == 1:
        return (0,), None
    return consecutive_group(config.cp_size * config.tp_size)
