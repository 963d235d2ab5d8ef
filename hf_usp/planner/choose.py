"""The ulysses degree of `UspParallelismConfig(ulysses_degree=None)`: what `hf-usp plan` ranks first for the same sizes.

Decided from what every rank knows equally: the model's config, the sizes, ranks of a node, the machine. No file, no
measurement, no clock.
"""

from __future__ import annotations

from typing import Any

from ..errors import UspConfigError
from ..sharding.degrees import choose_ulysses_degree
from .hardware import Machine
from .request import USABLE, PlanRequest, shape_of, size_of, text_config, with_nodes_of
from .search import best_inside
from .workload import TrainingStep

# Of a row that nobody gave the length of. Ring transfers of common models and GPUs are about to hide there.
TOKENS_A_RANK = 8192


def choose_degree(
    config: Any, machine: Machine | None, *, cp_size: int, tp_size: int, ranks: int, node: int, tokens: int | None
) -> tuple[int, str]:
    """The ulysses degree for a model's `config`, and the reason in words.

    The fastest split that fits, as `hf-usp plan` ranks them, of those whose ulysses groups lie inside a node of `node`
    ranks. On an unknown machine (None), or for a model whose sizes the planner cannot read, the one that moves the
    fewest bytes. tokens: of a row; None: 8,192 for each rank that shares it. ranks: all of them.
    """
    heads, kv_heads = _heads(config)
    try:
        shape = shape_of(config)
    except UspConfigError:
        shape = None
    if machine is None or shape is None:
        inside = node // tp_size if node % tp_size == 0 else 1
        return choose_ulysses_degree(cp_size, max(1, heads // tp_size), max(1, kv_heads // tp_size), inside)
    tokens = tokens or TOKENS_A_RANK * cp_size
    machine = with_nodes_of(machine, node)
    like = TrainingStep(1, kernel=next(iter(machine.kernels)))
    what = PlanRequest(str(config.model_type), shape, machine, tokens, ranks, machine.memory * USABLE, like=like)
    best = best_inside(what, tp_size, cp_size)
    degrees = best.degrees
    return degrees.ulysses, (
        f"ulysses {degrees.ulysses} x ring {degrees.ring} is the fastest that is predicted on {machine.name}, "
        f"{what.node} ranks a node, for rows of {tokens:,} tokens ({best.limit})"
    )


def _heads(config: Any) -> tuple[int, int]:
    text = text_config(config)
    heads, kv_heads = size_of(text, "num_attention_heads"), size_of(text, "num_key_value_heads")
    if not isinstance(heads, int) or not isinstance(kv_heads or heads, int):
        raise UspConfigError(
            f"a {text.model_type} with num_attention_heads={heads}, num_key_value_heads={kv_heads}",
            rule="ulysses_degree=None chooses by the model's head counts",
            remedy="pass ulysses_degree=... yourself",
        )
    return heads, kv_heads or heads
