"""Stand-ins for torch's CUDA flash operators: every call is bound to the operator's own schema, then computed.

The schema is the one of the installed torch; keywords must also be among those that torch 2.11 knows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_usp.kernels.dialects import Functions, torch_dialect
from hf_usp.kernels.flash import FlashKernel

from . import stand_in

FORWARD = torch.ops.aten._flash_attention_forward.default
BACKWARD = torch.ops.aten._flash_attention_backward.default
# Keyword-only arguments of both operators in torch 2.11.
KEYWORDS = {"scale", "window_size_left", "window_size_right"}
TYPES: dict[str, type | tuple[type, ...]] = {
    "Tensor": Tensor,
    "Optional[Tensor]": (Tensor, type(None)),
    "float": float,
    "Optional[float]": (float, type(None)),
    "bool": bool,
    "int": int,
    "Optional[int]": (int, type(None)),
    "SymInt": int,
    "Optional[SymInt]": (int, type(None)),
}


def kernel() -> FlashKernel:
    return FlashKernel("cuda_flash", torch_dialect, Functions(forward, backward))


def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = bind(FORWARD, args, kwargs)
    assert given["return_debug_mask"] is False
    out, lse = stand_in.forward(_call(given))
    return out, lse, torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64), torch.empty(0)


def backward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = bind(BACKWARD, args, kwargs)
    # The operator makes these two dense itself.
    dout, out = given["grad_out"].contiguous(), given["out"].contiguous()
    return stand_in.backward(_call(given), dout, out, given["logsumexp"])


def bind(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], keywords: set[str] = KEYWORDS) -> dict[str, Any]:
    """Arguments by name, checked for number, name and type against the operator's schema."""
    arguments = op._schema.arguments
    positional = [argument for argument in arguments if not argument.kwarg_only]
    assert len(args) <= len(positional), "more positional arguments than the operator has"
    given = dict(zip([argument.name for argument in positional], args, strict=False))
    assert not given.keys() & kwargs.keys(), "an argument given twice"
    assert kwargs.keys() <= keywords, f"keywords that torch 2.11 does not know: {kwargs.keys() - keywords}"
    given |= kwargs
    for argument in arguments:
        if argument.name not in given:
            assert argument.has_default_value(), f"{argument.name} is missing"
            continue
        expected = TYPES[str(argument.real_type)]
        if expected is Tensor and given[argument.name] is None:
            expected = type(None)  # an undefined tensor
        exact = type(given[argument.name]) is not bool or expected is bool
        assert isinstance(given[argument.name], expected) and exact, f"{argument.name}: {argument.real_type}"
    assert given["dropout_p"] == 0.0
    return given


def _call(given: dict[str, Any]) -> stand_in.Varlen:
    return stand_in.Varlen(
        *(given[name] for name in ("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k")),
        scale=given["scale"],
        causal=given["is_causal"],
        left=given["window_size_left"],
        right=given["window_size_right"],
        softcap=0.0,
    )
