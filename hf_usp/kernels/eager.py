"""The definition of a kernel: plain softmax over the visible keys, in any dtype on any device.

Shape suffixes: T packed query rows, K packed key rows, H query heads, G kv heads, N query heads per kv head, D key
width, E value width. Scores of at most `ROWS` query rows exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .base import Request, Segments, Softmax, accumulation_dtype

ROWS = 1024


class EagerKernel:
    name = "eager"

    def why_not(self, request: Request) -> str | None:
        return None

    def forward(
        self, q_THD: Tensor, k_KGD: Tensor, v_KGE: Tensor, segments: Segments, softmax: Softmax
    ) -> tuple[Tensor, Tensor]:
        acc = accumulation_dtype(q_THD.dtype)
        out_THE = q_THD.new_empty(*q_THD.shape[:2], v_KGE.shape[2])
        lse_HT = q_THD.new_empty(q_THD.shape[1], q_THD.shape[0], dtype=acc)
        for rows, keys, hidden in _blocks(segments, q_THD.device):
            q_TGND = q_THD[rows].to(acc).unflatten(1, (k_KGD.shape[1], -1))
            s_GNTK, _ = _scores(q_TGND, k_KGD[keys].to(acc), hidden, softmax)
            lse_GNT = s_GNTK.logsumexp(-1)
            p_GNTK = (s_GNTK - lse_GNT[..., None]).exp()
            out_THE[rows] = torch.einsum("gntk,kge->tgne", p_GNTK, v_KGE[keys].to(acc)).flatten(1, 2).to(q_THD.dtype)
            lse_HT[:, rows] = lse_GNT.flatten(0, 1)
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
        acc, groups = accumulation_dtype(q_THD.dtype), k_KGD.shape[1]
        dq_THD = torch.empty_like(q_THD)
        dk_KGD, dv_KGE = (torch.zeros_like(x, dtype=acc) for x in (k_KGD, v_KGE))
        for rows, keys, hidden in _blocks(segments, q_THD.device):
            q_TGND, dout_TGNE, out_TGNE = (
                x[rows].to(acc).unflatten(1, (groups, -1)) for x in (q_THD, dout_THE, out_THE)
            )
            k, v = k_KGD[keys].to(acc), v_KGE[keys].to(acc)
            s_GNTK, slope_GNTK = _scores(q_TGND, k, hidden, softmax)
            p_GNTK = (s_GNTK - lse_HT[:, rows].unflatten(0, (groups, -1))[..., None]).exp()
            delta_GNT = (dout_TGNE * out_TGNE).sum(-1).permute(1, 2, 0)
            dp_GNTK = torch.einsum("tgne,kge->gntk", dout_TGNE, v)
            ds_GNTK = p_GNTK * (dp_GNTK - delta_GNT[..., None]) * slope_GNTK * softmax.scale
            dq_THD[rows] = torch.einsum("gntk,kgd->tgnd", ds_GNTK, k).flatten(1, 2).to(q_THD.dtype)
            dk_KGD[keys] += torch.einsum("gntk,tgnd->kgd", ds_GNTK, q_TGND)
            dv_KGE[keys] += torch.einsum("gntk,tgne->kge", p_GNTK, dout_TGNE)
        return dq_THD, dk_KGD.to(k_KGD.dtype), dv_KGE.to(v_KGE.dtype)


def _blocks(segments: Segments, device: torch.device) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Query rows, key rows and hidden pairs [T, K] (None: all visible) of at most `ROWS` rows of one segment."""
    left, right = segments.window_size_left, segments.window_size_right
    for i, (q0, q1) in enumerate(zip(segments.q_offsets, segments.q_offsets[1:], strict=False)):
        k0, k1 = segments.k_offsets[i], segments.k_offsets[i + 1]
        for a in range(q0, q1, ROWS):
            b = min(a + ROWS, q1)
            diagonal = torch.arange(a - q0, b - q0, device=device)[:, None] + (k1 - k0) - (q1 - q0)
            back = diagonal - torch.arange(k1 - k0, device=device)
            hidden = None
            if left >= 0:
                hidden = back > left
            if right >= 0:
                hidden = back < -right if hidden is None else hidden | (back < -right)
            yield slice(a, b), slice(k0, k1), hidden


def _scores(q_TGND: Tensor, k_KGD: Tensor, hidden_TK: Tensor | None, softmax: Softmax) -> tuple[Tensor, Tensor | float]:
    """Scores as they enter the softmax, and their derivative with respect to scale * q.k."""
    s_GNTK = torch.einsum("tgnd,kgd->gntk", q_TGND, k_KGD) * softmax.scale
    slope: Tensor | float = 1.0
    if softmax.softcap is not None:
        bent = torch.tanh(s_GNTK / softmax.softcap)
        s_GNTK, slope = bent * softmax.softcap, 1 - bent * bent
    if hidden_TK is not None:
        s_GNTK = s_GNTK.masked_fill(hidden_TK, float("-inf"))
    return s_GNTK, slope
