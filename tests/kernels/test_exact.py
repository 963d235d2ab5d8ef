"""The kernels that run on a CPU against the oracle: every window, head count, width and dtype, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_usp.kernels import KERNELS, Kernel
from hf_usp.sharding.masks import Documents, Mask

from ..attention.virtual_ring import dense_mask, two_tiles, virtual_ring
from .cases import (
    HEADS,
    WINDOWS,
    Case,
    Data,
    allowed,
    assert_close,
    assert_no_worse,
    compute,
    draw,
    oracle,
    plain,
)

CPU_KERNELS = [KERNELS["eager"], KERNELS["cpu_flash"], KERNELS["blockwise"]]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-6}

on_both = pytest.mark.parametrize("kernel", CPU_KERNELS, ids=lambda kernel: kernel.name)
on_windows = pytest.mark.parametrize("window", WINDOWS)


@on_both
@on_windows
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_windows(kernel: Kernel, window: str, dtype: torch.dtype) -> None:
    case = WINDOWS[window]
    data = draw(case, dtype)
    result = compute(kernel, case, data)
    assert result.lse.dtype == dtype and result.out.dtype == dtype
    assert_close(result, oracle(data, allowed(case), case.softmax), TOLERANCE[dtype])


@on_both
@on_windows
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_at_most_twice_what_plain_torch_errs(
    kernel: Kernel, window: str, dtype: torch.dtype
) -> None:
    case = WINDOWS[window]
    data, mask = draw(case, dtype), allowed(case)
    result = compute(kernel, case, data)
    assert result.lse.dtype == torch.float32 and {x.dtype for x in result} == {dtype, torch.float32}
    assert_no_worse(result, oracle(data, mask, case.softmax), plain(data, mask, case.softmax))


@on_both
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("widths", [(16, 16), (24, 16), (16, 40), (13, 7)])
@pytest.mark.parametrize("window", ["causal", "band segments"])
def test_heads_and_widths(kernel: Kernel, heads: tuple[int, int], widths: tuple[int, int], window: str) -> None:
    case = WINDOWS[window].sized(heads=heads, widths=widths)
    data = draw(case, torch.float64)
    assert_close(compute(kernel, case, data), oracle(data, allowed(case), case.softmax), 1e-10)


def test_softcap() -> None:
    case = Case((20,), (33,), right=0, softcap=0.7)
    data = draw(case, torch.float64)
    exact = oracle(data, allowed(case), case.softmax)
    for name in ("eager", "blockwise"):
        assert_close(compute(KERNELS[name], case, data), exact, 1e-10)
    with pytest.raises(AssertionError, match="out"):
        assert_close(exact, oracle(data, allowed(case), Case((1,), (1,)).softmax), 1e-2)


@on_windows
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_several_blocks(window: str, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than eager, more rows and keys than blockwise keep scores for at a time."""
    for name, value in (("eager.ROWS", 7), ("blockwise.ROWS", 7), ("blockwise.KEYS", 5)):
        monkeypatch.setattr(f"hf_usp.kernels.{name}", value)
    case = replace(WINDOWS[window], softcap=softcap)
    data = draw(case, torch.float64)
    for kernel in ("eager", "blockwise"):
        assert_close(compute(KERNELS[kernel], case, data), oracle(data, allowed(case), case.softmax), 1e-10)


@on_both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_two_tiles_merged_and_their_gradients_added(kernel: Kernel, dtype: torch.dtype) -> None:
    case = Case((30,), (47,), heads=(6, 2), widths=(16, 24))
    data = draw(case, dtype)
    assert_close(two_tiles(kernel, data, 19, case.softmax), oracle(data, allowed(case), case.softmax), TOLERANCE[dtype])


@on_both
def test_two_tiles_in_bfloat16(kernel: Kernel) -> None:
    case = Case((30,), (47,), heads=(6, 2))
    data, mask = draw(case, torch.bfloat16), allowed(case)
    exact, yardstick = oracle(data, mask, case.softmax), plain(data, mask, case.softmax)
    assert_no_worse(two_tiles(kernel, data, 19, case.softmax), exact, yardstick)


MASKS = {
    "causal": Mask(Documents.from_bounds([0, 50])),
    "both directions": Mask(Documents.from_bounds([0, 50]), right=-1),
    "sliding": Mask(Documents.from_bounds([0, 50]), left=6),
    "sliding both ways": Mask(Documents.from_bounds([0, 50]), left=6, right=9),
    "packed": Mask(Documents.from_bounds([0, 7, 8, 31, 50])),
    "packed and sliding": Mask(Documents.from_bounds([0, 7, 8, 31, 50]), left=3),
}


@on_both
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_virtual_ring(kernel: Kernel, mask: Mask, order: str) -> None:
    """Four ring ranks in one process equal one dense softmax."""
    case = Case((50,), (50,), heads=(4, 2), widths=(16, 24))
    data = draw(case, torch.float64)
    exact = oracle(data, dense_mask(mask), case.softmax)
    assert_close(virtual_ring(kernel, data, mask, order, 4, case.softmax), exact, 1e-10)


@on_both
def test_views_of_any_strides(kernel: Kernel) -> None:
    """Rows out of a fused projection, transposed heads and sliced statistics give the same numbers."""
    case = WINDOWS["band segments"]
    data = draw(case, torch.float64)
    torch.manual_seed(1)
    fused = Data(
        *(torch.randn(len(x), 2, x.shape[2] + 3, x.shape[1]).double().transpose(2, 3)[:, 1, :, 1:-2] for x in data)
    )
    for view, x in zip(fused, data, strict=True):
        view.copy_(x)
        assert not view.is_contiguous()
    assert_close(compute(kernel, case, fused), oracle(data, allowed(case), case.softmax), 1e-10)
