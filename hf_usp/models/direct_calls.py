"""Wrappers that call `model.forward(...)` instead of `model(...)` (AdaLoRA, X-LoRA)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel

from ..batch.sharded_tensors import context_of
from .unsharded import is_generation


class DirectForwardCalls:
    """`model.forward(...)` with gradients runs the model's hooks, as `model(...)` does. Wrappers call it so.

    Without gradients it is the model's own forward on the full batch: one rank may call it alone.
    It is an attribute of the model with the signature of the class's forward; `remove` takes it back.

    inside: whether a forward of the model is under way, whose call of the base model is a part of it. generating:
    whether `generate` is under way.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.before = model, vars(model).get("forward")
        self.open, self.inside, self.generating = True, False, False
        plain: Any = model.forward
        own = isinstance(plain, MethodType) and plain.__self__ is model  # else a wrapper that has the model in it
        signature = inspect.signature(plain)
        names = list(signature.parameters)

        def forward(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            # A batch that has passed the hooks carries its layout, or is none of their business.
            batch = {**dict(zip(names, args, strict=False)), **kwargs}
            if context_of(*batch.values()) is not None:
                return plain.__func__(model, *args, **kwargs) if own else plain(*args, **kwargs)
            if self.open and torch.is_grad_enabled() and not is_generation(model, batch, self.generating):
                with self.closed():
                    return model(*args, **kwargs)
            with self.running():
                return plain.__func__(model, *args, **kwargs) if own else plain(*args, **kwargs)

        owner = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        parameters = [owner, *signature.parameters.values()]
        forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        self.forward = model.forward = MethodType(forward, model)  # copied with a model, it is the copy's

    def replaced(self) -> bool:
        """Whether somebody put another function in the place of the model's forward, as TRL does for one call."""
        return vars(self.model).get("forward") is not self.forward

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it the base model is called as a part of the model."""
        before, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = before

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Within it `model.forward` is the model's own: for what runs below the hooks."""
        before, self.open = self.open, False
        try:
            yield
        finally:
            self.open = before

    def remove(self) -> None:
        self.open = False  # for whoever has kept it
        if self.replaced():
            return
        if self.before is None:
            del self.model.forward
        else:
            self.model.forward = self.before
