"""The comparison sees small wrongs: a window off by one, a gradient off by 0.1 %, the diagonal in the other corner."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_usp.kernels import Segments, Softmax
from hf_usp.kernels.eager import EagerKernel

from ..attention.virtual_ring import two_tiles
from .cases import WINDOWS, Case, allowed, assert_close, assert_no_worse, compute, draw, oracle, plain


class WindowOffByOne(EagerKernel):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, softmax: Softmax) -> tuple[Tensor, Tensor]:
        return super().forward(q, k, v, replace(segments, window_size_left=segments.window_size_left + 1), softmax)


class GradientOff(EagerKernel):
    def backward(self, *args: object) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = super().backward(*args)  # type: ignore[arg-type]
        return dq, dk * 1.001, dv


class TopLeft(EagerKernel):
    """Causal as `is_causal` of torch's operators aligns it: query a sees the keys up to a."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, softmax: Softmax) -> tuple[Tensor, Tensor]:
        square = replace(segments, k_offsets=segments.q_offsets, cu_seqlens_k=segments.cu_seqlens_q)
        return super().forward(q, k[: len(q)], v[: len(q)], square, softmax)


class OwnStatistics(EagerKernel):
    """Returns the log-sum-exp in another base, as some kernels do."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, softmax: Softmax) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(q, k, v, segments, softmax)
        return out, lse / 0.6931


@pytest.mark.parametrize(
    ("kernel", "case", "seen"),
    [
        (WindowOffByOne(), WINDOWS["behind"], "out"),
        (WindowOffByOne(), WINDOWS["band, both sides"], "dv"),
        (GradientOff(), WINDOWS["causal"], "dk"),
        (TopLeft(), WINDOWS["causal, more keys"], "out"),
        (OwnStatistics(), WINDOWS["full"], "lse"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sabotage(kernel: EagerKernel, case: Case, seen: str, dtype: torch.dtype) -> None:
    data = draw(case, dtype)
    exact = oracle(data, allowed(case), case.softmax)
    assert_close(compute(EagerKernel(), case, data), exact, 2e-6)
    with pytest.raises(AssertionError, match=f"'{seen}'"):
        assert_close(compute(kernel, case, data), exact, 2e-6)


def test_sabotage_in_bfloat16() -> None:
    case = WINDOWS["behind"]
    data, mask = draw(case, torch.bfloat16), allowed(case)
    exact, yardstick = oracle(data, mask, case.softmax), plain(data, mask, case.softmax)
    with pytest.raises(AssertionError, match="twice those of plain torch"):
        assert_no_worse(compute(WindowOffByOne(), case, data), exact, yardstick)


def test_sabotaged_statistics_spoil_a_merge() -> None:
    case = Case((30,), (47,))
    data = draw(case, torch.float64)
    with pytest.raises(AssertionError, match="out"):
        assert_close(
            two_tiles(OwnStatistics(), data, 19, case.softmax), oracle(data, allowed(case), case.softmax), 1e-3
        )
