"""The calling conventions of each FlashAttention, one row each: FA2 (package and torch's own build), FA3, FA4.

Shape suffixes: T packed query rows, K packed key rows, H query heads, G kv heads, D key width, E value width.

All compute what `base` defines and take a backward with a final output and log-sum-exp. They differ in names of
arguments, devices, widths, and in traps, read in flash-attn 2.7 to 2.8, `hopper/flash_api.cpp`, flash-attn-4 4.0.0b4 to
b36 and torch 2.11 to 2.14:

- FA2 counts a window of `max_seqlen_k` or more as no limit, and next to a limit on the other side "no limit" becomes
  `max_seqlen_k`. Both are wrong where a segment has more queries than keys: its first rows lie lq - lk left of the
  diagonal. The lengths are only upper bounds, so `arguments` passes one that is large enough; that is right for all.
- FA2 and FA3 take another path where no segment has more than one query: FA2 one made for decoding, FA3 one without
  `causal`. So the longest query segment is never said to be one.
- FA3 splits keys by itself (`num_splits=0`), for which it takes memory; it gets 1. Its backward is deterministic up to
  widths of 192.
- "No limit" is -1; for FA4 it is None, and -1 is a bound that hides every key. Its forward returns two, four or five
  values.
- FA4 takes few widths on Blackwell: others are padded to one of those. (256, 256) is left out until a GPU has shown it.
- torch's operators compute by FA3 or FA4 once `torch.nn.attention.activate_flash_attention_impl` was called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..compat import cuda_flash_operators, installed_version, is_older
from .base import Segments, Softmax
from .packages import FA4_OLDEST, Functions, flash_attn_2, flash_attn_3, flash_attn_4

Gradients = tuple[Tensor, Tensor, Tensor]
Widths = tuple[int, int]
# Elements of two bytes in one 16-byte load.
LANE = 8


class Arguments(NamedTuple):
    """Everything but tensors of rows, by its meaning.

    Attributes:
        cu_seqlens_q: edges of the query segments.
        cu_seqlens_k: edges of the key segments.
        max_seqlen_q: at least the longest query segment.
        max_seqlen_k: at least the longest key segment.
        causal: whether the kernel gets causal=True.
        left: window_size_left; -1: no limit.
        right: window_size_right; -1: no limit.
        scale: factor of q.k.
        softcap: bound of the scores; 0: none.
        deterministic: whether the backward adds in one order; torch's own switch decides.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool
    left: int
    right: int
    scale: float
    softcap: float
    deterministic: bool


def arguments(segments: Segments, softmax: Softmax) -> Arguments:
    """Lengths and window under which every dialect computes exactly `segments`."""
    left, right = segments.window_size_left, segments.window_size_right
    max_seqlen_q, max_seqlen_k = segments.max_seqlen_q, segments.max_seqlen_k
    if left >= 0 or right >= 0:
        max_seqlen_k = max(max_seqlen_q, max_seqlen_k)
    return Arguments(
        segments.cu_seqlens_q,
        segments.cu_seqlens_k,
        max(2, max_seqlen_q),
        max_seqlen_k,
        left < 0 and right == 0,
        left,
        right,
        softmax.scale,
        softmax.softcap or 0.0,
        torch.are_deterministic_algorithms_enabled(),
    )


@dataclass(frozen=True)
class Dialect:
    """One row of the table.

    Attributes:
        title: its name in messages.
        load: its two functions, or why they cannot be had; the argument allows a download from the Hub.
        forward: (function, q, k, v, arguments) -> out and log-sum-exp.
        backward: (function, dout, q, k, v, out, lse, arguments) -> dq, dk, dv.
        majors: oldest and newest compute capability, major number.
        needs: the same in words.
        widths: (major capability, key width, value width) -> the widths to pad to; None: it takes no such heads.
        softcap: whether it bounds scores.
        deterministic_width: widest heads whose backward can be deterministic.
    """

    title: str
    load: Callable[[bool], Functions | str]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Gradients]
    majors: tuple[int, int]
    needs: str
    widths: Callable[[int, int, int], Widths | None]
    softcap: bool = False
    deterministic_width: int = 256


def _rounded(width: int, to: int = LANE) -> int:
    return -(-width // to) * to


def _one_width(major: int, head_dim: int, value_dim: int) -> Widths | None:
    width = _rounded(max(head_dim, value_dim))
    return (width, width) if width <= 256 else None


def _fa3_widths(major: int, head_dim: int, value_dim: int) -> Widths | None:
    """Two widths where FA3 has a kernel for them, those of DeepSeek."""
    two = _rounded(head_dim), _rounded(value_dim)
    return two if 128 < two[0] <= 192 and 96 < two[1] <= 128 else _one_width(major, head_dim, value_dim)


def _fa4_widths(major: int, head_dim: int, value_dim: int) -> Widths | None:
    two = _rounded(head_dim), _rounded(value_dim)
    if major < 10:
        return two if max(two) <= 256 else None
    if max(two) <= 128:  # its backward halves the values of wide heads over two blocks: `(E / 2) % 32 == 0`
        return (two[0], _rounded(value_dim, 64)) if two[0] == 128 else two
    return (192, 128) if two[0] <= 192 and two[1] <= 128 else None


# ------------------------------------------------------------------------------------------------ names of arguments


def _common(given: Arguments, causal: str, none: int | None) -> dict[str, Any]:
    """The keywords that the packages share."""
    return {
        "cu_seqlens_q": given.cu_seqlens_q,
        "cu_seqlens_k": given.cu_seqlens_k,
        "max_seqlen_q": given.max_seqlen_q,
        "max_seqlen_k": given.max_seqlen_k,
        "softmax_scale": given.scale,
        causal: given.causal,
        "window_size_left": none if given.left < 0 else given.left,
        "window_size_right": none if given.right < 0 else given.right,
        "softcap": given.softcap,
    }


def _backward(function: Callable[..., Any], tensors: dict[str, Tensor], keywords: dict[str, Any]) -> Gradients:
    """The packages write gradients into tensors of ours."""
    dq, dk, dv = (torch.empty_like(tensors[name], memory_format=torch.contiguous_format) for name in "qkv")
    function(**tensors, dq=dq, dk=dk, dv=dv, **keywords)
    return dq, dk, dv


def _fa2_forward(function: Any, q: Tensor, k: Tensor, v: Tensor, given: Arguments) -> tuple[Tensor, Tensor]:
    plain = {"dropout_p": 0.0, "alibi_slopes": None, "return_softmax": False}
    out, lse, *_ = function(q=q, k=k, v=v, **_common(given, "causal", -1), **plain)
    return out, lse


def _fa2_backward(function: Any, *tensors: Any) -> Gradients:
    *rows, given = tensors
    named = dict(zip(("dout", "q", "k", "v", "out", "softmax_lse"), rows, strict=True))
    plain = {"dropout_p": 0.0, "alibi_slopes": None, "deterministic": given.deterministic}
    return _backward(function, named, _common(given, "causal", -1) | plain)


def _fa3_forward(function: Any, q: Tensor, k: Tensor, v: Tensor, given: Arguments) -> tuple[Tensor, Tensor]:
    out, lse, *_ = function(q=q, k=k, v=v, **_common(given, "is_causal", -1), num_splits=1)
    return out, lse


def _fa3_backward(function: Any, *tensors: Any) -> Gradients:
    *rows, given = tensors
    named = dict(zip(("dout", "q", "k", "v", "out", "softmax_lse"), rows, strict=True))
    return _backward(function, named, _common(given, "is_causal", -1) | {"deterministic": given.deterministic})


def _fa4_forward(function: Any, q: Tensor, k: Tensor, v: Tensor, given: Arguments) -> tuple[Tensor, Tensor]:
    out, lse, *_ = function(q=q, k=k, v=v, **_common(given, "causal", None), return_lse=True)
    return out, lse


def _fa4_backward(function: Any, *tensors: Any) -> Gradients:
    *rows, given = tensors
    named = dict(zip(("dout", "q", "k", "v", "out", "lse"), rows, strict=True))
    return _backward(function, named, _common(given, "causal", None) | {"deterministic": given.deterministic})


def _torch_forward(function: Any, q: Tensor, k: Tensor, v: Tensor, given: Arguments) -> tuple[Tensor, Tensor]:
    window = {"window_size_left": given.left, "window_size_right": given.right}
    numbers = (*given[:4], 0.0, given.causal, False)
    out, lse, *_ = function(q, k, v, *numbers, scale=given.scale, **window)
    return out, lse


def _torch_backward(
    function: Any,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    given: Arguments,
) -> Gradients:
    window = {"window_size_left": given.left, "window_size_right": given.right}
    # Dropout is 0, so the state of its random numbers is asked for but never read.
    rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, device=q.device)
    numbers = (*given[:4], 0.0, given.causal, rng_state, unused)
    dq, dk, dv = function(dout, q, k, v, out, lse, *numbers, scale=given.scale, **window)
    return dq, dk, dv


def _torch_functions(download: bool) -> Functions | str:
    if not torch.backends.cuda.is_flash_attention_available():
        found = f"torch {installed_version('torch')}"
        return f"{found} was built without FlashAttention: install a build of torch that has it"
    return Functions(*cuda_flash_operators())


# ------------------------------------------------------------------------------------------------------------ the rows

_AMPERE, _HOPPER = "8.0 (Ampere) or newer", "9.0 (Hopper)"
_HOPPER_OR_BLACKWELL = "9.0 (Hopper) or 10.0 (Blackwell)"
FA2 = Dialect("FlashAttention 2", flash_attn_2, _fa2_forward, _fa2_backward, (8, 99), _AMPERE, _one_width, softcap=True)
FA3 = Dialect("FlashAttention 3", flash_attn_3, _fa3_forward, _fa3_backward, (9, 9), _HOPPER, _fa3_widths, True, 192)
FA4 = Dialect(
    "FlashAttention 4", flash_attn_4, _fa4_forward, _fa4_backward, (9, 10), _HOPPER_OR_BLACKWELL, _fa4_widths, True
)
TORCH = Dialect(
    "torch's FlashAttention", _torch_functions, _torch_forward, _torch_backward, (8, 99), _AMPERE, _one_width
)


def active_implementation() -> str | None:
    """The implementation behind torch's flash operators that somebody activated: "FA3", "FA4", or another."""
    return torch.nn.attention.current_flash_attention_impl()


def torch_dialect() -> Dialect | str:
    """The rules of torch's operators as they are now, or why hf_usp cannot know them."""
    match active_implementation():
        case None:
            return TORCH
        case "FA3":
            return _behind_torch(FA3, "torch's FA3", _torch_functions)
        case "FA4":
            return _behind_torch(FA4, "torch's FA4", _torch_fa4)
        case other:
            return (
                f"torch's flash operators are replaced by {other!r}, whose rules hf_usp does not know: "
                "call torch.nn.attention.restore_flash_attention_impl()"
            )


def _behind_torch(row: Dialect, title: str, load: Callable[[bool], Functions | str]) -> Dialect:
    """The limits of a row, called as torch's operators are."""
    return replace(row, title=title, load=load, forward=TORCH.forward, backward=TORCH.backward, softcap=False)


def _torch_fa4(download: bool) -> Functions | str:
    """torch before 2.14 unpacks two results of FA4, of which every supported release returns more."""
    if is_older("torch", "2.14.0.dev0"):
        return (
            f"torch {installed_version('torch')} does not know the results of flash-attn-4 {FA4_OLDEST} and newer: "
            "pip install 'torch>=2.14', or name kernel='fa4' without activating it in torch"
        )
    found = flash_attn_4(download)
    return found if isinstance(found, str) else _torch_functions(download)
