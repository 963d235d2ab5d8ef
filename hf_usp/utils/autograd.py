"""Backwards that cannot be differentiated again."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

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
