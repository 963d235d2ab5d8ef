"""torch's own flash attention for CPU: the embedded default there.

Shape suffixes: T packed query rows, K packed key rows, H query heads, G kv heads, D key width, E value width.

The limits of the operator decide this file. It takes [B, H, L, D] views of any strides but the last,
which it takes for 1 whatever it is; grouped-query heads natively; and it returns the log-sum-exp. Its `is_causal` is
aligned to the TOP LEFT, so it is used only on squares. An empty query or key kills the process. A row without a
visible key gets log-sum-exp 0 instead of -inf. Value width must equal key width. So blocks of rows split a band:
full rectangles and causal squares go through unmasked, the rest with an additive mask over just the keys that the
block sees, where every row sees at least one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..compat import cpu_flash_operators
from .base import Request, Segments, Softmax

_forward, _backward = cpu_flash_operators()


class _Call(NamedTuple):
    """One operator call: a block of rows against a range of keys; `band` = (first diagonal, left, right) if masked."""

    rows: slice
    keys: slice
    causal: bool
    band: tuple[int, int, int] | None


class CpuFlashKernel:
    name = "cpu_flash"

    def why_not(self, request: Request) -> str | None:
        if request.device.type != "cpu":
            return f"it computes on the CPU, the tensors are on {request.device.type}"
        if request.softmax.softcap is not None:
            return "torch's CPU flash operator has no softcap"
        if request.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return f"torch's CPU flash operator does not compute in {request.dtype}"
        return None

    def forward(
        self, q_THD: Tensor, k_KGD: Tensor, v_KGE: Tensor, segments: Segments, softmax: Softmax
    ) -> tuple[Tensor, Tensor]:
        width = v_KGE.shape[2]
        q, k, v = _as_batch(q_THD, k_KGD, v_KGE)
        calls = list(_calls(segments))
        if len(calls) == 1:
            out, lse = _forward(q, k, v, 0.0, calls[0].causal, attn_mask=_mask(calls[0], q), scale=softmax.scale)
            return _rows(out, width), lse[0]
        out_THE, lse_HT = None, None
        for call in calls:
            rows, keys = call.rows, call.keys
            out, lse = _forward(
                q[:, :, rows],
                k[:, :, keys],
                v[:, :, keys],
                0.0,
                call.causal,
                attn_mask=_mask(call, q),
                scale=softmax.scale,
            )
            out, lse = _rows(out, width), lse[0]
            if out_THE is None or lse_HT is None:
                out_THE = out.new_empty(q_THD.shape[0], *out.shape[1:])
                lse_HT = lse.new_empty(lse.shape[0], q_THD.shape[0])
            out_THE[rows], lse_HT[:, rows] = out, lse
        assert out_THE is not None and lse_HT is not None
        return out_THE, lse_HT

    def backward(
        self,
        dout_THE: Tensor,
        q_THD: Tensor,
        k_KGD: Tensor,
        v_KGE: Tensor,
        out_THE: Tensor,
        lse_HT: Tensor,
        segments: Segments,
        softmax: Softmax,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head_dim, width = q_THD.shape[2], v_KGE.shape[2]
        q, k, v, dout, out = _as_batch(q_THD, k_KGD, v_KGE, dout_THE, out_THE)
        lse = lse_HT[None]
        calls = list(_calls(segments))
        if len(calls) == 1:
            call = calls[0]
            dq, dk, dv = _backward(
                dout, q, k, v, out, lse, 0.0, call.causal, attn_mask=_mask(call, q), scale=softmax.scale
            )
            return _rows(dq, head_dim), _rows(dk, head_dim), _rows(dv, width)
        dq_THD = torch.empty_like(q_THD)
        # Keys are shared by neighbouring blocks of a band: their gradients are summed in fp32.
        acc = lse_HT.dtype
        dk_KGD, dv_KGE = (torch.zeros_like(x, dtype=acc) for x in (k_KGD, v_KGE))
        for call in calls:
            rows, keys = call.rows, call.keys
            at = (slice(None), slice(None), rows)
            dq, dk, dv = _backward(
                dout[at],
                q[at],
                k[:, :, keys],
                v[:, :, keys],
                out[at],
                lse[at],
                0.0,
                call.causal,
                attn_mask=_mask(call, q),
                scale=softmax.scale,
            )
            dq_THD[rows] = _rows(dq, head_dim)
            dk_KGD[keys] += _rows(dk, head_dim)
            dv_KGE[keys] += _rows(dv, width)
        return dq_THD, dk_KGD.to(k_KGD.dtype), dv_KGE.to(v_KGE.dtype)


def _as_batch(q_THD: Tensor, k_KGD: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """[1, H, L, D] views; tensors of value width are zero-padded to the common width (zeros change no product)."""
    # The operator takes any numbers of heads in silence and pairs them up wrongly.
    assert q_THD.shape[1] % k_KGD.shape[1] == 0, "query heads are a multiple of kv heads"
    width = max(q_THD.shape[2], *(x.shape[2] for x in values))
    return tuple(_dense_rows(x, width).transpose(0, 1)[None] for x in (q_THD, k_KGD, *values))


def _dense_rows(x_LHD: Tensor, width: int) -> Tensor:
    """Padded to `width`, neighbouring entries side by side: torch before 2.14 ignores the stride of the last dim."""
    x_LHD = x_LHD if x_LHD.shape[2] == width else pad(x_LHD, (0, width - x_LHD.shape[2]))
    return x_LHD if x_LHD.stride(2) == 1 else x_LHD.contiguous()


def _rows(x_1HLD: Tensor, width: int) -> Tensor:
    """Back to packed rows [L, H, width], as a view."""
    return x_1HLD[0, :, :, :width].transpose(0, 1)


def _calls(segments: Segments) -> Iterator[_Call]:
    """Cut every segment into operator calls whose rows do not overlap."""
    left, right = segments.window_size_left, segments.window_size_right
    for i, (q0, q1) in enumerate(zip(segments.q_offsets, segments.q_offsets[1:], strict=False)):
        k0, k1 = segments.k_offsets[i], segments.k_offsets[i + 1]
        lq, lk = q1 - q0, k1 - k0
        if left < 0 and right < 0:
            yield _Call(slice(q0, q1), slice(k0, k1), False, None)
        elif left < 0 and right == 0 and lq == lk:
            yield _Call(slice(q0, q1), slice(k0, k1), True, None)
        else:
            # Blocks a sixteenth of the window high: the mask covers at most 6 % more than the band.
            width = (left if left >= 0 else lk) + (right if right >= 0 else lk)
            height = max(16, min(256, width // 16))
            for a in range(0, lq, height):
                b = min(a + height, lq)
                lo = max(0, a + lk - lq - left) if left >= 0 else 0
                hi = min(lk, b + lk - lq + right) if right >= 0 else lk
                yield _Call(slice(q0 + a, q0 + b), slice(k0 + lo, k0 + hi), False, (a + lk - lq - lo, left, right))


def _mask(call: _Call, like: Tensor) -> Tensor | None:
    """Additive mask [T, K] of a block of a band, in the dtype of the queries."""
    if call.band is None:
        return None
    first, left, right = call.band
    rows, keys = call.rows.stop - call.rows.start, call.keys.stop - call.keys.start
    back = torch.arange(first, first + rows, device=like.device)[:, None] - torch.arange(keys, device=like.device)
    hidden = (back > left) if left >= 0 else torch.zeros_like(back, dtype=torch.bool)
    if right >= 0:
        hidden |= back < -right
    return torch.zeros(rows, keys, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))
