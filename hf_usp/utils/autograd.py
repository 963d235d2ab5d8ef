"""Backwards that cannot be differentiated again."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..compat import reference_counts
from ..errors import UspModelError

Backward = Callable[..., Any]


def forbid_double_backward(backward: Backward) -> Backward:
    """The backward of an autograd function of ours; with `create_graph=True` it raises `UspModelError` instead.

    torch's `once_differentiable` raises only if the incoming gradient requires grad. For a loss it does not, so
    `create_graph=True` would silently drop terms. We raise instead. The first backward of a sharded step is that of its
    loss, so all ranks stop before any message.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise UspModelError(
                "a backward with create_graph=True through a function of hf_usp",
                rule="the backwards of attention, exchanges, chunks and losses are kernels and messages, which have no "
                "derivatives of their own",
                remedy="leave out create_graph; second derivatives (gradient penalties, products with the Hessian) "
                "need one process with attn_implementation='eager'",
            )
        return backward(ctx, *grads)

    return checked


def unshared_references() -> frozenset[tuple[int, ...]]:
    """`reference_counts` of gradients that autograd's engine and one backward alone have: of a tensor, and of a view.

    A backward that finds one of them, as the first that it does with `grads[0]`, may overwrite the gradient. Other
    views, sums that it is a part of, hooks that keep it, and callers who pass it to `backward` refer to it, too.
    """
    found: list[tuple[int, ...]] = []
    with torch.enable_grad():
        for seen_as in (lambda y: y, lambda y: y.view(4)):
            y = _Unshared.apply(torch.zeros(2, 2, requires_grad=True), found)
            (seen_as(y) * 2).sum().backward()
    return frozenset(found)


class _Unshared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, found: list[tuple[int, ...]]) -> Tensor:
        ctx.found = found
        return x.clone()

    @staticmethod
    @forbid_double_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.found.append(reference_counts(grads[0]))
        return grads[0], None
