"""Stand-ins for torch's dense operators on CUDA, cuDNN's and the memory-efficient one, bound to torch's own schemas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_usp.compat import cudnn_operators, efficient_operators
from hf_usp.kernels import Segments, Softmax
from hf_usp.kernels.eager import EagerKernel

from .fake_aten import bind

EAGER = EagerKernel()
EFFICIENT_KEYWORDS = {"scale", "window_size", "num_splits_key"}


def one(queries: int, keys: int, left: int, right: int) -> Segments:
    cu_seqlens_q, cu_seqlens_k = (torch.tensor([0, n], dtype=torch.int32) for n in (queries, keys))
    return Segments((0, queries), (0, keys), left, right, cu_seqlens_q, cu_seqlens_k)


def check(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    assert x.ndim == 4 and x.shape[0] == 1 and x.dtype in dtypes
    assert x.shape[3] % 8 == 0, "alignment of widths"
    assert x.stride(3) == 1 and x.storage_offset() % 8 == 0 and all(s % 8 == 0 for s in x.stride()[1:3]), "alignment"


# ------------------------------------------------------------------------------------------- cuDNN: [B, H, L, D]


def _cudnn(given: dict[str, Any]) -> tuple[tuple[Tensor, Tensor, Tensor], Segments]:
    tensors = tuple(given[name] for name in ("query", "key", "value"))
    for x in tensors:
        check(x, (torch.float16, torch.bfloat16))
    q, k, v = (x[0].transpose(0, 1) for x in tensors)
    assert given["attn_bias"] is None and given["dropout_p"] == 0.0
    # Aligned to the top left: of rectangles only those without a mask are ours.
    assert not given["is_causal"] or len(q) == len(k), "causal in the other corner"
    return (q, k, v), one(len(q), len(k), -1, 0 if given["is_causal"] else -1)


def cudnn_forward(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    given = bind(cudnn_operators()[0], args, kwargs, {"scale"})
    assert given["compute_log_sumexp"] is True
    (q, k, v), segments = _cudnn(given)
    out, lse = EAGER.forward(q, k, v, segments, Softmax(given["scale"]))
    return out.transpose(0, 1)[None], lse[None, ..., None], None, None, len(q), len(k), None, None, None


def cudnn_backward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    given = bind(cudnn_operators()[1], args, kwargs, {"scale"})
    (q, k, v), segments = _cudnn(given)
    assert (given["max_q"], given["max_k"]) == (len(q), len(k))
    dout, out = (given[name][0].transpose(0, 1) for name in ("grad_out", "out"))
    lse = given["logsumexp"]
    assert lse.shape == (1, q.shape[1], len(q), 1) and lse.dtype == torch.float32
    grads = EAGER.backward(dout, q, k, v, out, lse[0, ..., 0], segments, Softmax(given["scale"]))
    return tuple(grad.transpose(0, 1)[None] for grad in grads)


# --------------------------------------------------------------------------------- memory-efficient: [B, L, H, D]


def _efficient(given: dict[str, Any]) -> tuple[tuple[Tensor, Tensor, Tensor], Segments]:
    tensors = tuple(given[name] for name in ("query", "key", "value"))
    for x in tensors:
        check(x, (torch.float32, torch.float16, torch.bfloat16))
    q, k, v = (x[0] for x in tensors)
    assert q.shape[1] == k.shape[1] == v.shape[1], "torch before 2.14 knows no grouped-query heads"
    assert (given["max_seqlen_q"], given["max_seqlen_k"]) == (len(q), len(k)), "lengths of dense rows"
    assert all(given[name] is None for name in ("bias", "cu_seqlens_q", "cu_seqlens_k")) and given["dropout_p"] == 0.0
    mask, window = given["custom_mask_type"], given["window_size"]
    assert mask in (0, 2) and (window is None or (mask == 2 and window > 0)), "a window counts the diagonal"
    left = -1 if window is None else window - 1
    return (q, k, v), one(len(q), len(k), left, 0 if mask else -1)


def efficient_forward(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    given = bind(efficient_operators()[0], args, kwargs, EFFICIENT_KEYWORDS)
    assert given["compute_log_sumexp"] is True
    (q, k, v), segments = _efficient(given)
    out, lse = EAGER.forward(q, k, v, segments, Softmax(given["scale"]))
    padded = torch.full((1, q.shape[1], -(-len(q) // 32) * 32), float("inf"))
    padded[0, :, : len(q)] = lse
    return out[None], padded, None, None, len(q), len(k)


def efficient_backward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    given = bind(efficient_operators()[1], args, kwargs, EFFICIENT_KEYWORDS)
    (q, k, v), segments = _efficient(given)
    assert given["bias_requires_grad"] is False and given["num_splits_key"] in (None, 1)
    lse, out = given["logsumexp"], given["out"][0]
    assert lse.is_contiguous() and lse.stride(1) % 8 == 0 and lse.shape[2] >= len(q), "`lse_strideH % 8`"
    assert out.stride(0) == out.shape[1] * out.shape[2], "there is no stride of rows of `out`"
    grads = EAGER.backward(given["grad_out_"][0], q, k, v, out, lse[0, :, : len(q)], segments, Softmax(given["scale"]))
    return *(grad[None] for grad in grads), torch.empty(0)
