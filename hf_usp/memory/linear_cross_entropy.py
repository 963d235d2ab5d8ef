"""The sum of the token losses of a linear head, in chunks of tokens.

For every chunk of tokens: logits, what the model does to them, and the loss. In the backward the same again, and the
gradient of the logits, which is spent on the gradients of hidden states and weight at once.

Weight gradients are summed over chunks in fp32 (or fp64), so bf16 loses nothing by chunks.

Where ranks share the vocabulary (tensor parallelism), weight and bias are this rank's rows of them: every chunk's loss
is computed by `loss_over_parts`, and the gradient of its hidden states summed over these ranks, in fp32.

Shape suffixes: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..distributed.comm import all_reduce_sum
from ..distributed.loss import VocabularyPart, loss_over_parts
from ..kernels import accumulation_dtype
from ..utils.autograd import forbid_double_backward
from ..utils.dtypes import no_autocast

LogitTransform = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class LMHead:
    """From a chunk of hidden states to the sum of its token losses.

    Attributes:
        changes: transforms of the logits (softcap, scaling), in order.
        chunk: tokens of a chunk.
        ignored: label that counts for nothing.
        smoothing: label smoothing.
        autocast: dtype of autocast; None: off.
        part: entries of the vocabulary that this rank holds; None: all.
    """

    changes: tuple[LogitTransform, ...]
    chunk: int
    ignored: int
    smoothing: float
    autocast: torch.dtype | None
    part: VocabularyPart | None

    def cast(self, tensor: Tensor | None) -> Any:
        return tensor if tensor is None or self.autocast is None else tensor.to(self.autocast)

    def loss(self, logits_TV: Tensor, labels_T: Tensor) -> Tensor:
        for change in self.changes:
            logits_TV = change(logits_TV)
        if self.part is not None:
            return loss_over_parts(logits_TV, labels_T, self.part, self.ignored, self.smoothing)
        return functional.cross_entropy(
            logits_TV, labels_T, ignore_index=self.ignored, reduction="sum", label_smoothing=self.smoothing
        )

    def whole(self, d_TD: Tensor) -> Tensor:
        """The gradient of hidden states from the parts of it that ranks have."""
        if self.part is None:
            return d_TD
        return all_reduce_sum(d_TD.to(accumulation_dtype(d_TD.dtype)), self.part.group)


class ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Sum of token losses []; forward and backward walk over the same chunks and hold one chunk of logits at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_T: Tensor, head: LMHead
    ) -> Tensor:
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, labels_T)
        ctx.head = head
        with no_autocast(hidden_TD.device):
            weight_VD, bias_V = head.cast(weight_VD), head.cast(bias_V)
            chunks = zip(hidden_TD.split(head.chunk), labels_T.split(head.chunk), strict=True)
            losses = [head.loss(functional.linear(head.cast(h), weight_VD, bias_V), labels) for h, labels in chunks]
            return torch.stack(losses).sum()

    @staticmethod
    @forbid_double_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, bias_V, labels_T = ctx.saved_tensors
        head, (wants_hidden, wants_weight, wants_bias, *_) = ctx.head, ctx.needs_input_grad
        d_hidden_TD = torch.empty_like(hidden_TD) if wants_hidden else None
        d_weight_VD = _zeros(weight_VD) if wants_weight else None
        d_bias_V = _zeros(bias_V) if wants_bias else None
        weight, bias = head.cast(weight_VD), head.cast(bias_V)
        for start in range(0, len(hidden_TD), head.chunk):
            chunk = slice(start, start + head.chunk)
            h_TD = head.cast(hidden_TD[chunk])
            with no_autocast(hidden_TD.device), torch.enable_grad():
                logits_TV = functional.linear(h_TD.detach(), weight.detach(), bias).detach().requires_grad_()
                loss = head.loss(logits_TV, labels_T[chunk])
            (d_TV,) = torch.autograd.grad(loss, logits_TV, grads[0])
            del logits_TV, loss  # of one chunk at a time
            if d_hidden_TD is not None:
                d_hidden_TD[chunk] = head.whole(d_TV @ weight)
            if d_weight_VD is not None:
                _add_product(d_weight_VD, d_TV.T, h_TD)
            if d_bias_V is not None:
                d_bias_V += d_TV.sum(0, dtype=d_bias_V.dtype)
            del d_TV
        return d_hidden_TD, _back(d_weight_VD, weight_VD), _back(d_bias_V, bias_V), None, None


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=accumulation_dtype(like.dtype))


def _back(total: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if total is None or like is None else total.to(like.dtype)


def _add_product(total_VD: Tensor, d_VT: Tensor, h_TD: Tensor) -> None:
    if d_VT.dtype == total_VD.dtype:
        total_VD.addmm_(d_VT, h_TD)
    else:
        total_VD += d_VT @ h_TD
