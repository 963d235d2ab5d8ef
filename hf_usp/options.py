"""The options of a `UspParallelismConfig` that can be checked by themselves."""

from __future__ import annotations

from .costs.machines import check_machine
from .errors import UspConfigError
from .integers.dealing import ALL_ORDERS
from .integers.degrees import check_degrees


def check_options(cp_size: int, ulysses_degree: int | None, sequence_order: str) -> None:
    """Raise `UspConfigError` for degrees that do not fit and orders that are not there."""
    if not isinstance(cp_size, int) or cp_size < 1:
        raise UspConfigError(f"cp_size={cp_size!r}", rule="cp_size is a whole number of at least 1")
    if ulysses_degree is not None:
        check_degrees(cp_size, ulysses_degree)
    if sequence_order not in ("auto", *ALL_ORDERS):
        raise UspConfigError(
            f"sequence_order={sequence_order!r}",
            rule=f"it is one of auto, {', '.join(ALL_ORDERS)}",
            remedy="use 'auto'",
        )


def check_chunks(loss_chunk: int | None, mlp_chunk: int | None, gather_outputs: bool) -> None:
    """Raise `UspConfigError` for chunks of no tokens, and for logits that are both left out and to be gathered."""
    for name, chunk in (("loss_chunk", loss_chunk), ("mlp_chunk", mlp_chunk)):
        if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
            raise UspConfigError(f"{name}={chunk!r}", rule="it is a number of tokens of at least 1, or None")
    if loss_chunk is not None and gather_outputs:
        raise UspConfigError(
            f"loss_chunk={loss_chunk} with gather_outputs=True",
            rule="a loss in chunks leaves no logits to be gathered",
            remedy="choose one: loss_chunk for training, gather_outputs for predict and compute_metrics",
        )


def check_choice(ranks_per_node: int | None, machine: str | None, sequence_length: int | None) -> None:
    """Raise `UspConfigError` for what no ulysses degree can be chosen from. Files are looked at when they are read."""
    for name, value in (("ranks_per_node", ranks_per_node), ("sequence_length", sequence_length)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UspConfigError(f"{name}={value!r}", rule="it is a whole number of at least 1, or None")
    if machine is not None and not machine.endswith(".json"):
        check_machine(machine)
