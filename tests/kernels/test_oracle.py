"""The oracle itself, against torch's attention in fp64 and against sinks written as one more key."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..oracle import dense_attention, dense_lse
from .cases import WINDOWS, allowed, draw


def test_oracle_is_torchs_attention() -> None:
    case = WINDOWS["band"]
    data, mask = draw(case, torch.float64), allowed(case)
    q, k, v = (x[None].transpose(1, 2) for x in data[:3])
    torchs = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
    ours = dense_attention(*(x[None] for x in data[:3]), mask, 0.3)
    assert (ours.transpose(1, 2) - torchs).abs().max() < 1e-12


def test_a_sink_is_one_more_key_with_value_zero() -> None:
    case = WINDOWS["causal"].sized(heads=(2, 2), widths=(16, 8))
    q, k, v = (x[None] for x in draw(case, torch.float64)[:3])
    mask, sinks = allowed(case), torch.tensor([0.4, -2.0], dtype=torch.float64)
    # A key whose score is the sink: the queries' first entry is 1, the key has sink / scale there.
    q[..., 0], k[..., 0] = 1.0, 0.0
    extra = torch.zeros(1, 1, 2, 16, dtype=torch.float64)
    extra[0, 0, :, 0] = sinks / 0.3
    wide = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.bool)], dim=1)
    with_key = (torch.cat([k, extra], dim=1), torch.cat([v, torch.zeros(1, 1, 2, 8, dtype=torch.float64)], dim=1))
    out, lse = dense_attention(q, k, v, mask, 0.3, sinks=sinks), dense_lse(q, k, mask, 0.3, sinks=sinks)
    assert (out - dense_attention(q, *with_key, wide, 0.3)).abs().max() < 1e-12
    assert (lse - dense_lse(q, with_key[0], wide, 0.3)).abs().max() < 1e-12


def test_a_row_without_keys_is_zero_and_has_no_slope() -> None:
    case = WINDOWS["full"]
    q, k, v = (x[None].requires_grad_() for x in draw(case, torch.float64)[:3])
    mask = torch.ones(40, 40, dtype=torch.bool)
    mask[3] = False
    out = dense_attention(q, k, v, mask, 0.3)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert (out[0, 3] == 0).all() and (grads[0][0, 3] == 0).all() and not any(g.isnan().any() for g in grads)
    assert dense_lse(q, k, mask, 0.3)[0, :, 3].tolist() == [-torch.inf] * 4
    batch_of_masks = dense_attention(
        torch.cat([q, q]), torch.cat([k, k]), torch.cat([v, v]), mask.expand(2, 40, 40), 0.3
    )
    torch.testing.assert_close(batch_of_masks[1], out[0], atol=1e-13, rtol=0)
