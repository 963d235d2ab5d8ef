"""`gather` and `reduce` of an accelerator whose ranks share batches: rows and counts once, never parts of a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, recursively_apply

from ..compat import tree_leaves
from ..errors import UspModelError
from ..models.hooks import ContextParallelHooks
from .streaming import rows_of_step


@dataclass(frozen=True)
class Gathering:
    """`gather`, `reduce` and `gather_for_metrics` of one accelerator.

    Rows (tensors with a first dim, or objects) are taken from one of every cp_size x tp_size ranks, which hold the
    same ones. Numbers (tensors without dims) are taken from one of every cp_size ranks, so their count is the
    accelerator's `num_processes`. Code that counts under tensor parallelism divides by tp_size, as Transformers and
    TRL do.

    Attributes:
        accelerator: the accelerator.
        cp_size: ranks that share a sequence.
        tp_size: tensor-parallel ranks.
        stock_gather: Accelerate's own `gather`.
        stock_reduce: Accelerate's own `reduce`.
    """

    accelerator: Accelerator
    cp_size: int
    tp_size: int
    stock_gather: Callable[[Any], Any]
    stock_reduce: Callable[..., Any]

    def gather(self, tensor: Any) -> Any:
        """Tensors (nested ones too), concatenated along their first dim."""
        return self._gather(tensor, None)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """As in Accelerate; a sum counts the ranks that share a sequence once. Means need no such care."""
        reduced = self.stock_reduce(tensor, reduction, scale)
        return recursively_apply(self._once, reduced) if reduction == "sum" else reduced

    def gather_for_metrics(self, data: Any, use_gather_object: bool = False) -> Any:
        """As `gather`, without the rows that fill up the last batch of a data loader; objects come as a list."""
        try:
            recursively_apply(lambda x: x, data, error_on_other_type=True)
        except TypeError:
            use_gather_object = True
        last = rows_of_step(self.accelerator.gradient_state)
        if not use_gather_object:
            return self._gather(data, last)
        ranks = gather_object([data])[:: self.cp_size * self.tp_size]
        return [row for rows in ranks for row in rows][:last]

    def _gather(self, data: Any, last: int | None) -> Any:
        distinct = self.cp_size * self.tp_size

        def once(tensor: torch.Tensor) -> torch.Tensor:
            gathered = self.stock_gather(tensor)
            if tensor.ndim == 0:
                return gathered[:: self.cp_size][: None if last is None else last * self.tp_size]
            ranks = gathered.unflatten(0, (-1, len(tensor))) if len(tensor) else gathered[None]
            return ranks[::distinct].flatten(0, 1)[:last]

        return recursively_apply(once, data, error_on_other_type=True)

    def _once(self, total: torch.Tensor) -> torch.Tensor:
        if total.is_floating_point() or total.is_complex():
            return total / self.cp_size
        return total // self.cp_size


def refuse_shares(data: Any, prepared: Iterable[ContextParallelHooks]) -> None:
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
