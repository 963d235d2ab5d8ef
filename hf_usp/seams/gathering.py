"""What `Accelerator.gather_for_metrics` puts together when ranks share batches: rows once, and no shares of a row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, recursively_apply
from torch.utils._pytree import tree_leaves

from ..errors import UspModelError
from ..models.prepare import ShardedForward


def gather_once(accelerator: Accelerator, data: Any, copies: int, as_objects: bool) -> Any:
    """As in Accelerate, from the ranks that hold different rows: one of every `copies`.

    Tensors (nested ones too) are put together along their first dim; other objects, lists of which hold one a row, as a
    list. What fills up the last batch of a data loader is cut off.
    """
    state = accelerator.gradient_state
    try:
        recursively_apply(lambda x: x, data, error_on_other_type=True)
    except TypeError:
        as_objects = True
    cut = state.remainder if state.end_of_dataloader and state.remainder > 0 else None
    if as_objects:
        ranks = gather_object([data])[::copies]
        return [row for rows in ranks for row in rows][:cut]

    def distinct(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(0, (accelerator.num_processes, -1))[::copies].flatten(0, 1)[:cut]

    return recursively_apply(distinct, accelerator.gather(data))


def refuse_shares(data: Any, prepared: Iterable[ShardedForward]) -> None:
    """Refuse to gather logits and hidden states of the last forwards that were left as shares of the tokens.

    They are told by their shapes: mixed precision hands on copies.
    """
    shares = frozenset[tuple[int, ...]]().union(*(hooks.shares for hooks in prepared))
    for tensor in tree_leaves(data):
        if isinstance(tensor, torch.Tensor) and tuple(tensor.shape) in shares:
            raise UspModelError(
                f"logits or hidden states {tuple(tensor.shape)} to be gathered over processes that hold shares of the "
                "tokens",
                rule="whole ones are only there with gather_outputs=True",
                remedy="UspParallelismConfig(gather_outputs=True) for predict and compute_metrics, or "
                "prediction_loss_only=True for the loss alone",
            )
