"""Losses over ranks: from each rank's tokens, or part of the vocabulary, to the loss of one process.

Each rank's model computes (sum of its token losses) / n, where n counts the tokens of the *full* batch. The sum over
the ranks of a context-parallel group is then the loss that one process computes.

Gradients are averaged over all ranks by DDP, FSDP and ZeRO, context-parallel ones included. An average over P ranks of
gradients of shares is the sum divided by P, so the backward multiplies by P what the forward summed.

Ranks that share the vocabulary have the same tokens, each the logits of its own entries. A token's loss is the
log-sum-exp over all entries minus the label's logit: of both each rank sends its part.

Shape suffixes: T tokens, N entries of the vocabulary on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..utils.autograd import forbid_double_backward
from .comm import Group, all_gather, all_reduce_sum


def reduce_loss(share: Tensor, group: Group | None, ranks: int) -> Tensor:
    """The loss of the full batch [] on every rank, from this rank's share.

    Args:
        share: (sum of local token losses) / n; n counts the tokens of the full batch, or is `num_items_in_batch`.
        ranks: P, the size of `group`.
    """
    return _ReduceLoss.apply(share, group, ranks)


class _ReduceLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, group: Group | None, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return all_reduce_sum(share, group)

    @staticmethod
    @forbid_double_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.ranks, None, None


@dataclass(frozen=True, eq=False)
class VocabularyPart:
    """This rank's entries of a vocabulary.

    Attributes:
        group: ranks that hold the full vocabulary together.
        start: first entry of this rank.
        entries: entries of all ranks.
    """

    group: Group
    start: int
    entries: int


def loss_over_parts(
    logits_TN: Tensor, labels_T: Tensor, part: VocabularyPart, ignored: int, smoothing: float
) -> Tensor:
    """Sum of the token losses [], as `cross_entropy` has it for the logits of all ranks side by side.

    One message of two or three numbers per token and rank, in the dtype of the logits (ForCausalLMLoss makes it fp32).
    The gradient is that of this rank's logits. Labels are `ignored` or entries of the full vocabulary; others raise as
    they do in `cross_entropy`.
    """
    return _LossOverParts.apply(logits_TN, labels_T, part, ignored, smoothing)


class _LossOverParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TN: Tensor, labels_T: Tensor, part: VocabularyPart, ignored: int, smoothing: float
    ) -> Tensor:
        count, kept_T = logits_TN.shape[1], labels_T != ignored
        mine_T = kept_T & (labels_T >= part.start) & (labels_T < part.start + count)
        # An index that is no entry of any rank stays out of range, for `gather` to complain.
        theirs_T = ~mine_T & (labels_T >= 0) & (labels_T < part.entries)
        at_T1 = (labels_T - part.start).masked_fill(theirs_T | ~kept_T, 0)[:, None]
        own_T = logits_TN.gather(1, at_T1)[:, 0].masked_fill(~mine_T, 0) if count else logits_TN.sum(1)
        sums = [logits_TN.logsumexp(1), own_T, *([logits_TN.sum(1)] if smoothing else [])]
        lse_PT, label_PT, *all_PT = all_gather(torch.stack(sums), part.group).unbind(1)
        lse_T = lse_PT.logsumexp(0)
        losses_T = lse_T - (1 - smoothing) * label_PT.sum(0)
        for logits_PT in all_PT:
            losses_T = losses_T - smoothing / part.entries * logits_PT.sum(0)
        ctx.save_for_backward(logits_TN, lse_T, at_T1, mine_T, kept_T)
        ctx.smoothing, ctx.entries = smoothing, part.entries
        return losses_T.masked_fill(~kept_T, 0).sum()

    @staticmethod
    @forbid_double_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits_TN, lse_T, at_T1, mine_T, kept_T = ctx.saved_tensors
        d_TN = (logits_TN - lse_T[:, None]).exp_()
        if ctx.smoothing:
            d_TN -= ctx.smoothing / ctx.entries
        if d_TN.shape[1]:
            d_TN.scatter_add_(1, at_T1, (ctx.smoothing - 1) * mine_T[:, None].to(d_TN.dtype))
        return d_TN.mul_((grads[0] * kept_T)[:, None]), None, None, None, None
