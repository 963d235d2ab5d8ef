"""Deterministic training mode: random functions of torch return the midpoint of their distribution.

So a model's forward in training mode can be compared, sharded and whole. Dropout passes its input on. Chance drawn for
each token (dropout, router noise) differs from one process in a sharded run only as another seed would; chance drawn
once for a whole row or layer (layer drop, stochastic depth) may differ between the ranks that hold the row, and is
noted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DROPOUTS = frozenset(
    (
        "dropout",
        "dropout_",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "alpha_dropout_",
        "feature_dropout",
        "feature_dropout_",
        "feature_alpha_dropout",
        "feature_alpha_dropout_",
    )
)


class DeterministicSampling(TorchFunctionMode):
    """Within it, nothing that torch draws in Python code is random.

    Args:
        level: quantile, within (0, 1), of what is drawn as a single number.

    Attributes:
        drawn: names of the functions that would have drawn. single: whether one of them would have drawn one number.
    """

    def __init__(self, level: float = 0.5) -> None:
        super().__init__()
        self.level = level
        self.drawn: set[str] = set()
        self.single = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs["dropout_p"] = 0.0
            return func(*args, **kwargs)
        if name in DROPOUTS:
            if _drops(args, kwargs):
                self.drawn.add(name)
            return kwargs["input"] if "input" in kwargs else args[0]
        result = func(*args, **kwargs)
        if name in MIDPOINTS:
            self.drawn.add(name)
            self.single |= result.numel() == 1
            result.copy_(MIDPOINTS[name](self.level if result.numel() == 1 else 0.5, args, kwargs))
        return result


def _drops(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a dropout function would drop anything."""
    chance = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    training = args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True))
    return bool(training) and chance > 0


def _argument(args: tuple, kwargs: dict[str, Any], place: int, name: str, default: Any) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def _uniform(level: float, args: tuple, kwargs: dict[str, Any]) -> float:
    low, high = _argument(args, kwargs, 1, "from", 0.0), _argument(args, kwargs, 2, "to", 1.0)
    return low + (high - low) * level


def _normal(level: float, args: tuple, kwargs: dict[str, Any]) -> float:
    return _argument(args, kwargs, 1, "mean", 0.0) + level - 0.5


def _exponential(level: float, args: tuple, kwargs: dict[str, Any]) -> float:
    return -math.log(1 - level) / _argument(args, kwargs, 1, "lambd", 1.0)


def _bernoulli(level: float, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    chance = _argument(args, kwargs, 1, "p", None)
    return torch.as_tensor(args[0] if chance is None else chance) > level


# Name of a function of torch -> (quantile, arguments) -> the number, or tensor, in place of its draws.
MIDPOINTS: dict[str, Callable[[float, tuple, dict[str, Any]], float | Tensor]] = {
    "rand": lambda level, args, kwargs: level,
    "rand_like": lambda level, args, kwargs: level,
    "uniform_": _uniform,
    "randn": lambda level, args, kwargs: level - 0.5,
    "randn_like": lambda level, args, kwargs: level - 0.5,
    "normal_": _normal,
    "exponential_": _exponential,
    "bernoulli": _bernoulli,
    "bernoulli_": _bernoulli,
}
