"""A stand-in for the flash-attn package with the exact signatures of its variable-length functions.

`release(version)` makes the modules `flash_attn` and `flash_attn.flash_attn_interface` of one release, to be put into
`sys.modules`. The signatures are those of 2.7.0 (the first whose window is two numbers), 2.7.4 to 2.8.3
(`zero_tensors`) and 2.8.4 (`num_splits`).
"""

from __future__ import annotations

import ast
import inspect
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import stand_in

FORWARD = (
    "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal window_size_left=-1 "
    "window_size_right=-1 softcap=0.0 alibi_slopes=None return_softmax=False block_table=None leftpad_k=None "
    "seqused_k=None"
)
BACKWARD = (
    "dout q k v out softmax_lse dq dk dv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale "
    "causal window_size_left window_size_right softcap alibi_slopes deterministic rng_state=None"
)
EXTRA = {
    "2.7.0.post2": ("", ""),
    "2.8.3": (" zero_tensors=False", " zero_tensors=False"),
    "2.8.4": (" zero_tensors=False num_splits=0", " zero_tensors=False"),
}


def release(version: str) -> dict[str, ModuleType]:
    extra_forward, extra_backward = EXTRA.get(version, ("", ""))
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    package.__spec__ = ModuleSpec("flash_attn", loader=None, origin="flash_attn/__init__.py")
    package.__version__ = version  # type: ignore[attr-defined]
    forward, backward = signature(FORWARD + extra_forward), signature(BACKWARD + extra_backward)

    def varlen_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        given = _bind(forward, args, kwargs)
        assert not any(given.get(name) for name in ("return_softmax", "block_table", "leftpad_k", "seqused_k"))
        out, lse = stand_in.forward(_call(given))
        return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)

    def varlen_backward(*args: Any, **kwargs: Any) -> Tensor:
        given = _bind(backward, args, kwargs)
        assert isinstance(given["deterministic"], bool) and given.get("rng_state") is None
        grads = stand_in.backward(_call(given), given["dout"], given["out"], given["softmax_lse"])
        for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
            assert given[name].stride(-1) == 1 and given[name].dtype == grad.dtype
            assert given[name].shape == grad.shape, f"{name} is written in place"
            given[name].copy_(grad)
        return torch.empty(0)

    varlen_forward.__signature__, varlen_backward.__signature__ = forward, backward  # type: ignore[attr-defined]
    interface._flash_attn_varlen_forward = varlen_forward  # type: ignore[attr-defined]
    interface._flash_attn_varlen_backward = varlen_backward  # type: ignore[attr-defined]
    package.flash_attn_interface = interface  # type: ignore[attr-defined]
    return {"flash_attn": package, "flash_attn.flash_attn_interface": interface}


def signature(text: str) -> inspect.Signature:
    parameters = []
    for word in text.split():
        name, _, default = word.partition("=")
        given = ast.literal_eval(default) if default else inspect.Parameter.empty
        parameters.append(inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=given))
    return inspect.Signature(parameters)


def _bind(expected: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    assert not args, "calls by keyword only"
    bound = expected.bind(*args, **kwargs)
    bound.apply_defaults()
    given = dict(bound.arguments)
    assert given["dropout_p"] == 0.0 and given["alibi_slopes"] is None
    # The package declares its functions as operators, whose schema does not turn one type into another.
    floats, booleans = ("dropout_p", "softmax_scale", "softcap"), ("causal",)
    assert all(type(given[name]) is float for name in floats) and all(type(given[name]) is bool for name in booleans)
    return given


def _call(given: dict[str, Any]) -> stand_in.Varlen:
    return stand_in.Varlen(
        *(given[name] for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")),
        scale=given["softmax_scale"],
        causal=given["causal"],
        left=given["window_size_left"],
        right=given["window_size_right"],
        softcap=given["softcap"],
    )
