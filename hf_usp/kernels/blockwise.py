"""Attention in blocks of queries and keys by plain matrix products: any dtype, width, window, softcap and device.

Shape suffixes: T packed query rows, K packed key rows, H query heads, G kv heads, R query rows of all heads of a kv
head, D key width, E value width. Scores of at most `ROWS` queries and `KEYS` keys exist at a time.

The computation is FlashAttention's (arXiv 2307.08691): scores and statistics are in fp32, weights and score gradients
are rounded to the dtype of the inputs before they are multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .base import Request, Segments, Softmax, accumulation_dtype

ROWS, KEYS = 1024, 2048


class BlockwiseKernel:
    name = "blockwise"

    def why_not(self, request: Request) -> str | None:
        return None

    def forward(
        self, q_THD: Tensor, k_KGD: Tensor, v_KGE: Tensor, segments: Segments, softmax: Softmax
    ) -> tuple[Tensor, Tensor]:
        groups = k_KGD.shape[1]
        out_THE = q_THD.new_empty(*q_THD.shape[:2], v_KGE.shape[2])
        lse_HT = q_THD.new_empty(q_THD.shape[1], len(q_THD), dtype=accumulation_dtype(q_THD.dtype))
        for rows, blocks in _blocks(segments, q_THD.device):
            q_GRD = _by_group(q_THD[rows], groups)
            out_GRE = lse_GR = None
            for keys, hidden in blocks:
                s_GRK, _ = _scores(q_GRD, k_KGD[keys], hidden, softmax)
                more_GR = s_GRK.logsumexp(-1)
                total_GR = more_GR if lse_GR is None else torch.logaddexp(lse_GR, more_GR)
                base_GR = total_GR.masked_fill(total_GR == -torch.inf, 0)  # rows that have seen no key yet
                p_GRK = (s_GRK - base_GR[..., None]).exp().to(q_THD.dtype)
                more_GRE = _product(p_GRK, v_KGE[keys].transpose(0, 1))
                if out_GRE is not None and lse_GR is not None:
                    more_GRE = more_GRE.add_(out_GRE * (lse_GR - base_GR).exp()[..., None])
                out_GRE, lse_GR = more_GRE, total_GR
            assert out_GRE is not None and lse_GR is not None
            out_THE[rows] = _by_row(out_GRE, rows.stop - rows.start).to(q_THD.dtype)
            lse_HT[:, rows] = lse_GR.unflatten(1, (-1, rows.stop - rows.start)).flatten(0, 1)
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
        acc, groups, dtype = accumulation_dtype(q_THD.dtype), k_KGD.shape[1], q_THD.dtype
        dq_THD = torch.empty_like(q_THD)
        dk_KGD, dv_KGE = (torch.zeros_like(x, dtype=acc) for x in (k_KGD, v_KGE))
        for rows, blocks in _blocks(segments, q_THD.device):
            q_GRD, dout_GRE = _by_group(q_THD[rows], groups), _by_group(dout_THE[rows], groups)
            delta_GR = (dout_GRE.to(acc) * _by_group(out_THE[rows], groups).to(acc)).sum(-1)
            lse_GR = lse_HT[:, rows].unflatten(0, (groups, -1)).flatten(1)
            dq_GRD = q_GRD.new_zeros(q_GRD.shape, dtype=acc)
            for keys, hidden in blocks:
                s_GRK, slope_GRK = _scores(q_GRD, k_KGD[keys], hidden, softmax)
                p_GRK = (s_GRK - lse_GR[..., None]).exp_()
                ds_GRK = _product(dout_GRE, v_KGE[keys].permute(1, 2, 0)).sub_(delta_GR[..., None])
                ds_GRK = ds_GRK.mul_(p_GRK).mul_(slope_GRK).mul_(softmax.scale).to(dtype)
                dq_GRD += _product(ds_GRK, k_KGD[keys].transpose(0, 1))
                dk_KGD[keys] += _product(ds_GRK.mT, q_GRD).transpose(0, 1)
                dv_KGE[keys] += _product(p_GRK.to(dtype).mT, dout_GRE).transpose(0, 1)
            dq_THD[rows] = _by_row(dq_GRD, rows.stop - rows.start).to(dtype)
        return dq_THD, dk_KGD.to(k_KGD.dtype), dv_KGE.to(v_KGE.dtype)


def _blocks(segments: Segments, device: torch.device) -> Iterator[tuple[slice, list[tuple[slice, Tensor | None]]]]:
    """Blocks of query rows; for each the blocks of keys that they see, and the hidden pairs [T, K] (None: all seen)."""
    left, right = segments.window_size_left, segments.window_size_right
    for i, (q0, q1) in enumerate(zip(segments.q_offsets, segments.q_offsets[1:], strict=False)):
        k0, k1 = segments.k_offsets[i], segments.k_offsets[i + 1]
        for a in range(q0, q1, ROWS):
            b = min(a + ROWS, q1)
            first, last = (row - q0 + (k1 - k0) - (q1 - q0) for row in (a, b - 1))
            lo = max(0, first - left) if left >= 0 else 0
            hi = min(k1 - k0, last + right + 1) if right >= 0 else k1 - k0
            blocks = []
            for start in range(lo, hi, KEYS):
                stop = min(start + KEYS, hi)
                hidden = None
                if (left >= 0 and last - start > left) or (right >= 0 and stop - 1 - first > right):
                    diagonal = torch.arange(first, last + 1, device=device)[:, None]
                    back = diagonal - torch.arange(start, stop, device=device)
                    hidden = (back > left) if left >= 0 else torch.zeros_like(back, dtype=torch.bool)
                    hidden = hidden | (back < -right) if right >= 0 else hidden
                blocks.append((slice(k0 + start, k0 + stop), hidden))
            yield slice(a, b), blocks


def _scores(q_GRD: Tensor, k_KGD: Tensor, hidden_TK: Tensor | None, softmax: Softmax) -> tuple[Tensor, Tensor | float]:
    """Scores of a block as they enter the softmax, and their derivative with respect to scale * q.k."""
    s_GRK = _product(q_GRD, k_KGD.permute(1, 2, 0)).mul_(softmax.scale)
    slope: Tensor | float = 1.0
    if softmax.softcap is not None:
        bent = s_GRK.div_(softmax.softcap).tanh_()
        slope, s_GRK = 1 - bent * bent, bent * softmax.softcap
    if hidden_TK is not None:
        s_GRK.unflatten(1, (-1, len(hidden_TK))).masked_fill_(hidden_TK, -torch.inf)
    return s_GRK, slope


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for every kv head, in fp32 (fp64 for fp64)."""
    acc = accumulation_dtype(a.dtype)
    if a.device.type == "cuda" and a.dtype in (torch.float16, torch.bfloat16):
        return torch.bmm(a, b, out_dtype=acc)
    return torch.bmm(a.to(acc), b.to(acc))


def _by_group(x_THD: Tensor, groups: int) -> Tensor:
    """[T, H, D] to [G, R, D]: the rows of all query heads of a kv head, one head after the other."""
    return x_THD.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _by_row(x_GRD: Tensor, rows: int) -> Tensor:
    """Back to [T, H, D]."""
    return x_GRD.unflatten(1, (-1, rows)).permute(2, 0, 1, 3).flatten(1, 2)
