"""Wrappers that call `model.forward(...)` instead of `model(...)`, and those that add to the loss it returns."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .bodies import layout_of
from .unsharded import is_generation

# By name: PEFT need not be installed.
ADDS_TO_LOSS = ("AdaLoraModel",)


class DirectCalls:
    """`model.forward(...)` goes the way of `model(...)`, for wrappers that call it so: through the model's hooks.

    It is an attribute of the model with the signature of the class's forward; `remove` takes it back.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.before = model, vars(model).get("forward")
        self.open = True
        plain: Any = model.forward
        own = isinstance(plain, MethodType) and plain.__self__ is model  # else a wrapper that has the model in it
        signature = inspect.signature(plain)
        names = list(signature.parameters)

        def forward(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            # What has passed the hooks carries its layout, or is none of their business.
            batch = {**dict(zip(names, args, strict=False)), **kwargs}
            if self.open and layout_of(batch) is None and not is_generation(model, batch):
                with self.closed():
                    return model(*args, **kwargs)
            return plain.__func__(model, *args, **kwargs) if own else plain(*args, **kwargs)

        owner = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        parameters = [owner, *signature.parameters.values()]
        forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        self.forward = model.forward = MethodType(forward, model)  # copied with a model, it is the copy's

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
        if vars(self.model).get("forward") is not self.forward:
            return
        if self.before is None:
            del self.model.forward
        else:
            self.model.forward = self.before


class AddedLoss:
    """The wrapper around a model that adds to its loss what every rank computes in full (AdaLoRA's orthogonality).

    A caller who gives a token count multiplies the loss by the number of processes (`loss.whole_loss`). There the
    wrapper's sum is divided by the ranks that share a batch, instead of the model's loss alone.
    """

    def __init__(self, around: nn.Module, ranks: int) -> None:
        self.ranks = ranks
        wrappers = [module for module in around.modules() if type(module).__name__ in ADDS_TO_LOSS]
        self.handles = [wrapper.register_forward_hook(self._divide, with_kwargs=True) for wrapper in wrappers[:1]]

    def _divide(self, wrapper: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if kwargs.get("num_items_in_batch") is not None and output.get("loss") is not None:
            output["loss"] = output["loss"] / self.ranks
        return output

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def __deepcopy__(self, memo: dict) -> AddedLoss:
        return self
