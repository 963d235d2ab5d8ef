"""Counting tokens: from every rank's share of the loss to the loss of the whole batch.

Each rank's model computes (sum of its token losses) / n, where n counts the tokens of the *whole* batch. The sum over
the ranks of a context-parallel group is then the loss that one process computes.

Gradients are averaged over all ranks by DDP, FSDP and ZeRO, context-parallel ones included. An average over P ranks of
gradients of shares is the sum divided by P, so the backward multiplies by P what the forward summed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .comm import Group, all_reduce_sum
from .once import differentiated_once


def whole_loss(share: Tensor, group: Group, ranks: int, items_given: bool) -> Tensor:
    """The loss of the whole batch [] on every rank, from this rank's share.

    Args:
        share: (sum of local token losses) / n.
        ranks: P, the size of `group`.
        items_given: whether n is the caller's `num_items_in_batch`. Then the result is the whole loss / P: a caller who
            counts tokens over all processes, as the Trainer does, multiplies by the number of processes himself
            (`loss *= num_processes`), which counts the P ranks that share one batch P times.
    """
    return _WholeLoss.apply(share, group, ranks, 1 / ranks if items_given else 1.0)


class _WholeLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, group: Group, ranks: int, weight: float) -> Tensor:
        ctx.factor = ranks * weight
        return all_reduce_sum(share, group) * weight

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.factor, None, None, None
