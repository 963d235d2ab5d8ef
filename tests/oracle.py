"""The one oracle: attention written down from its definition, dense, in fp64, differentiable by autograd.

Shape suffixes: B batch, S query rows, T query rows of one row of the batch, K keys, H query heads, G kv heads, D key
width, E value width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense_attention(
    q_BSHD: Tensor,
    k_BKGD: Tensor,
    v_BKGE: Tensor,
    allowed: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """out_BSHE in fp64. `allowed` [S, K] or [B, S, K] says which keys a query sees; a row that sees none gives zeros.

    Query head h reads kv head h // (H // G). `sinks` [H]: the score of one more key per head, with value zero.
    """
    s_BHSK = _scores(q_BSHD, k_BKGD, allowed, scale, softcap)
    return _weighted(s_BHSK, _log_sum(s_BHSK, sinks), v_BKGE)


def dense_lse(
    q_BSHD: Tensor,
    k_BKGD: Tensor,
    allowed: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """lse_BHS in fp64: the log of the sum of exp(score) over the keys that a row sees; -inf where it sees none."""
    s_BHSK = _scores(q_BSHD, k_BKGD, allowed, scale, softcap)
    lse_BHS = _log_sum(s_BHSK, sinks)
    return lse_BHS if sinks is not None else lse_BHS.masked_fill((s_BHSK == -torch.inf).all(-1), -torch.inf)


def _scores(q_BSHD: Tensor, k_BKGD: Tensor, allowed: Tensor, scale: float, softcap: float | None) -> Tensor:
    k_BKHD = k_BKGD.double().repeat_interleave(q_BSHD.shape[2] // k_BKGD.shape[2], dim=2)
    s_BHSK = torch.einsum("bshd,bkhd->bhsk", q_BSHD.double(), k_BKHD) * scale
    if softcap is not None:
        s_BHSK = softcap * torch.tanh(s_BHSK / softcap)
    return s_BHSK.masked_fill(~(allowed[None, None] if allowed.ndim == 2 else allowed[:, None]), -torch.inf)


def _log_sum(s_BHSK: Tensor, sinks: Tensor | None) -> Tensor:
    # A row without keys is given a finite number, so that its weights exp(-inf - number) and their slopes are zero.
    alone = (s_BHSK == -torch.inf).all(-1)
    lse_BHS = s_BHSK.masked_fill(alone[..., None], 0.0).logsumexp(-1)
    if sinks is None:
        return lse_BHS
    sink_H11 = sinks.double()[:, None]
    return torch.where(alone, sink_H11.expand_as(lse_BHS), torch.logaddexp(lse_BHS, sink_H11))


def _weighted(s_BHSK: Tensor, lse_BHS: Tensor, v_BKGE: Tensor) -> Tensor:
    v_BKHE = v_BKGE.double().repeat_interleave(s_BHSK.shape[1] // v_BKGE.shape[2], dim=2)
    return torch.einsum("bhsk,bkhe->bshe", (s_BHSK - lse_BHS[..., None]).exp(), v_BKHE)
