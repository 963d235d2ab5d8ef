"""New tokens over keys of which each rank holds some: against a dense softmax in fp64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_usp.attention import decode
from hf_usp.kernels import KERNELS, Softmax

B, HEADS, GROUPS, WIDTH, VALUES, RANKS = 2, 4, 2, 8, 8, 3
FIRST = (0, 5)  # the first visible token of each row


def dense(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax: Softmax, sinks: Tensor | None) -> Tensor:
    """Shapes [B, m, H, D], [B, S, G, D]; visible [B, m, S]."""
    k, v = (x.repeat_interleave(HEADS // GROUPS, dim=2) for x in (k, v))
    scores = torch.einsum("bmhd,bshd->bmhs", q, k) * softmax.scale
    if softmax.softcap is not None:
        scores = torch.tanh(scores / softmax.softcap) * softmax.softcap
    scores = scores.masked_fill(~visible[:, :, None], float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None].expand(*scores.shape[:3], 1)], dim=-1)
    return torch.einsum("bmhs,bshe->bmhe", scores.softmax(-1)[..., : v.shape[1]], v)


@pytest.mark.parametrize("kernel", ["eager", "cpu_flash", "blockwise"])
@pytest.mark.parametrize(("new", "window"), [(1, -1), (1, 1), (7, -1), (7, 3)], ids=str)
@pytest.mark.parametrize("special", ["", "sinks, softcap"])
def test_parts_of_ranks_merge_to_the_whole(
    monkeypatch: pytest.MonkeyPatch, kernel: str, new: int, window: int, special: str
) -> None:
    """One token or several; a rank holds no visible key where the window is short."""
    softmax = Softmax(WIDTH**-0.5, 2.0 if special and kernel != "cpu_flash" else None)
    generator = torch.Generator().manual_seed(3)
    length = 20 + new
    q, k, v = (
        torch.randn(B, n, heads, WIDTH, generator=generator, dtype=torch.float64)
        for n, heads in ((new, HEADS), (length, GROUPS), (length, GROUPS))
    )
    sinks = torch.randn(HEADS, generator=generator, dtype=torch.float64) if special else None
    query, keys = np.arange(20, length), np.arange(length)
    lowest = [np.maximum(np.full(new, first), query - window if window >= 0 else 0) for first in FIRST]
    seen = [(keys >= low[:, None]) & (keys <= query[:, None]) for low in lowest]
    visible = torch.from_numpy(np.stack(seen))
    owner = np.concatenate((keys[:20] % RANKS, np.arange(new) * RANKS // new))
    held = [np.flatnonzero(owner == rank) for rank in range(RANKS)]
    parts = []
    for own in held:
        rows = [(np.searchsorted(own, low), np.searchsorted(own, query + 1)) for low in lowest]
        tiles = decode.decode_tiles(rows, q.device)
        parts.append(decode.attend_to_held(q, k[:, own], v[:, own], tiles, softmax, KERNELS[kernel]))
    monkeypatch.setattr(decode, "all_gather", lambda part, group: torch.stack(parts))
    mesh: Any = SimpleNamespace(group=object())
    found = decode.merge_over_ranks(parts[0], sinks, mesh)
    torch.testing.assert_close(found, dense(q, k, v, visible, softmax, sinks), atol=1e-10, rtol=1e-10)
    assert window != 1 or any(bool(part[..., -1].isinf().any()) for part in parts)
