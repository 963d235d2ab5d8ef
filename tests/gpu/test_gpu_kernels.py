"""Every CUDA kernel against the definition: windows, heads, widths, forward and backward, in parts and in a ring.

The exact result is the fp64 oracle's, of the same rounded inputs; a kernel may err at most twice what plain torch errs
in that dtype. `eager`, the definition, is held to the oracle in fp64 on the same device first.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hf_usp.kernels import KERNELS, Kernel, Request, Softmax, choose_kernel
from hf_usp.sharding.masks import Documents, Mask

from ..attention.virtual_ring import dense_mask, two_tiles, virtual_ring
from ..kernels.cases import (
    HEADS,
    WINDOWS,
    Case,
    Data,
    Result,
    allowed,
    assert_close,
    assert_no_worse,
    compute,
    draw,
    oracle,
    plain,
    segments,
)

pytestmark = pytest.mark.gpu
Record = Callable[[str, object], None]

MASKS = {
    "causal": Mask(Documents.from_bounds([0, 700])),
    "both directions": Mask(Documents.from_bounds([0, 700]), right=-1),
    "sliding": Mask(Documents.from_bounds([0, 700]), left=90),
    "sliding both ways": Mask(Documents.from_bounds([0, 700]), left=90, right=130),
    "packed": Mask(Documents.from_bounds([0, 7, 8, 331, 700])),
    "packed and sliding": Mask(Documents.from_bounds([0, 7, 8, 331, 700]), left=40),
}


def check(record: Record, found: Result, data: Data, mask: torch.Tensor, softmax: Softmax) -> None:
    errors = assert_no_worse(found, oracle(data, mask, softmax), plain(data, mask, softmax))
    record("errors", errors)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("factor", [1, 9])
def test_windows(
    kernel: Kernel, window: str, factor: int, dtype: torch.dtype, device: torch.device, record_property: Record
) -> None:
    """As they are: one block of a kernel. Nine times as long: edges inside and between blocks."""
    case = WINDOWS[window].scaled(factor).sized(widths=(64, 64))
    data = draw(case, dtype, device)
    check(record_property, compute(kernel, case, data), data, allowed(case), case.softmax)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("widths", [(32, 32), (80, 80), (128, 128), (256, 256), (192, 128), (64, 100), (13, 7)])
def test_heads_and_widths(
    kernel: Kernel, heads: tuple[int, int], widths: tuple[int, int], device: torch.device, record_property: Record
) -> None:
    case = WINDOWS["band segments"].scaled(9).sized(heads=heads, widths=widths)
    data = draw(case, torch.bfloat16, device)
    check(record_property, compute(kernel, case, data), data, allowed(case), case.softmax)


@pytest.mark.parametrize("dtype64", [torch.float64, torch.float32])
@pytest.mark.parametrize("window", WINDOWS)
def test_eager_is_the_definition(window: str, dtype64: torch.dtype, device: torch.device) -> None:
    case = WINDOWS[window]
    data = draw(case, dtype64, device)
    tolerance = 1e-10 if dtype64 == torch.float64 else 2e-5
    assert_close(compute(KERNELS["eager"], case, data), oracle(data, allowed(case), case.softmax), tolerance)


def test_two_tiles_merged_and_their_gradients_added(
    kernel: Kernel, dtype: torch.dtype, device: torch.device, record_property: Record
) -> None:
    """Each tile's backward gets the final output and log-sum-exp."""
    case = Case((300,), (470,), heads=(8, 2), widths=(64, 64))
    data = draw(case, dtype, device)
    check(record_property, two_tiles(kernel, data, 190, case.softmax), data, allowed(case), case.softmax)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_virtual_ring(
    kernel: Kernel, mask: Mask, order: str, dtype: torch.dtype, device: torch.device, record_property: Record
) -> None:
    """Four ring ranks, one after the other on one GPU, against one dense softmax."""
    case = Case((700,), (700,), heads=(4, 2), widths=(64, 64))
    data = draw(case, dtype, device)
    check(
        record_property,
        virtual_ring(kernel, data, mask, order, 4, case.softmax),
        data,
        dense_mask(mask),
        case.softmax,
    )


def test_virtual_ring_against_one_call_of_the_same_kernel(
    kernel: Kernel, dtype: torch.dtype, device: torch.device, record_property: Record
) -> None:
    case = Case((2048,), (2048,), right=0, heads=(8, 2), widths=(128, 128))
    data = draw(case, dtype, device)
    one, mask = compute(kernel, case, data), Mask(Documents.from_bounds([0, 2048]))
    whole = Result(*(x.double() for x in one))
    ring = virtual_ring(kernel, data, mask, "zigzag", 4, case.softmax)
    # Both round to the same dtype, each partial result once more: a few units in the last place of the largest entry.
    assert_close(ring, whole, 4 * torch.finfo(dtype).eps)
    exact = oracle(data, torch.ones(2048, 2048, dtype=torch.bool).tril(), case.softmax)
    record_property("errors", assert_no_worse(ring, exact, one))


def test_sliced_statistics_and_rows_of_a_packed_message(kernel: Kernel, device: torch.device) -> None:
    """Log-sum-exp sliced from a larger tensor; keys and values side by side, with a width that breaks alignment."""
    case = Case((200,), (200,), right=0, heads=(4, 1), widths=(64, 36))
    data = draw(case, torch.bfloat16, device)
    whole = compute(kernel, case, data)
    packed = torch.cat([data.k.flatten(1), data.v.flatten(1)], dim=1)
    k, v = (x.unflatten(1, (1, -1)) for x in packed.split([64, 36], dim=1))
    wide = torch.full((4, 500), float("nan"), device=device)
    wide[:, 111:311] = whole.lse
    final = whole.out, wide[:, 111:311]
    parts = segments(case, device)
    out, lse = kernel.forward(data.q, k, v, parts, case.softmax)
    grads = kernel.backward(data.dout, data.q, k, v, *final, parts, case.softmax)
    assert torch.equal(out, whole.out) and torch.equal(lse, whole.lse)
    # dq is summed by atomic additions in any order.
    exact = Result(*(x.double() for x in whole))
    assert_close(Result(out, lse, *grads), exact, 4 * torch.finfo(torch.bfloat16).eps)


def test_softcap(device: torch.device, record_property: Record) -> None:
    """By the kernel that is chosen for it: a package of FlashAttention where one is installed, else in blocks."""
    case = Case((300,), (300,), right=0, softcap=0.7, widths=(64, 64))
    data = draw(case, torch.bfloat16, device)
    kernel = choose_kernel(device, torch.bfloat16, 64, case.softmax)
    assert kernel.name in ("flash_attn", "fa3", "fa4", "blockwise")
    check(record_property, compute(kernel, case, data), data, allowed(case), case.softmax)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 64), (torch.float32, 320), (torch.bfloat16, 512)])
def test_what_flash_attention_refuses(
    dtype: torch.dtype, width: int, device: torch.device, record_property: Record
) -> None:
    """float32 and heads above 256, every window: by torch's memory-efficient attention."""
    kernel = choose_kernel(device, dtype, width, Softmax(0.1))
    assert kernel.name == "efficient"
    for case in WINDOWS.values():
        wide = case.sized(widths=(width, width), heads=(4, 2))
        data, mask = draw(wide, dtype, device), allowed(wide)
        found = compute(kernel, wide, data)
        if dtype == torch.float32:  # by three products in TF32: near float32, but not plain torch's
            assert_close(found, oracle(data, mask, wide.softmax), 2e-5)
        else:
            check(record_property, found, data, mask, wide.softmax)


def test_choice_on_this_device(kernel: Kernel, device: torch.device) -> None:
    request = Request(device, torch.bfloat16, 64, 64, Softmax(0.125))
    assert kernel.why_not(request) is None, f"{kernel.name}: {kernel.why_not(request)}"
    assert choose_kernel(device, torch.bfloat16, 64, request.softmax, kernel.name) is kernel
    assert choose_kernel(device, torch.bfloat16, 64, request.softmax).name not in ("efficient", "blockwise", "eager")
    assert choose_kernel(device, torch.float64, 64, request.softmax).name == "blockwise"


def test_the_comparison_sees_a_window_off_by_one(kernel: Kernel, device: torch.device) -> None:
    case = WINDOWS["behind"].sized(widths=(64, 64))
    data, mask = draw(case, torch.bfloat16, device), allowed(case)
    exact, yardstick = oracle(data, mask, case.softmax), plain(data, mask, case.softmax)
    other = Case(case.lq, case.lk, case.left + 1, case.right, case.heads, case.widths)
    with pytest.raises(AssertionError, match="twice those of plain torch"):
        assert_no_worse(compute(kernel, other, data), exact, yardstick)
