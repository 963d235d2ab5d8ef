"""Both carriers of FlashAttention 2, every argument that they pass, without a GPU.

`fake_flash_attn` stands in for the package, `fake_aten` for torch's CUDA operators; both end in `stand_in`, which
checks and computes as the real code does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_usp.errors import UspKernelError
from hf_usp.kernels import Kernel, Segments, Softmax, choose_kernel, varlen
from hf_usp.kernels.cuda_flash import CudaFlashKernel
from hf_usp.kernels.flash_attn import FlashAttnKernel
from hf_usp.sharding.masks import Documents, Mask

from ..attention.virtual_ring import dense_mask, two_tiles, virtual_ring
from . import fake_aten, fake_flash_attn
from .cases import (
    HEADS,
    WINDOWS,
    Case,
    Data,
    allowed,
    assert_no_worse,
    compute,
    draw,
    oracle,
    plain,
    segments,
)

Adapter = Callable[[], Kernel]


@pytest.fixture(params=["flash_attn 2.7.0.post2", "flash_attn 2.8.3", "flash_attn 2.8.4", "aten"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    package, _, version = request.param.partition(" ")
    if package == "aten":
        return fake_aten.kernel()
    for name, module in fake_flash_attn.release(version).items():
        monkeypatch.setitem(sys.modules, name, module)
    return FlashAttnKernel()


def check(kernel: Kernel, case: Case, data: Data) -> None:
    mask = allowed(case)
    assert_no_worse(compute(kernel, case, data), oracle(data, mask, case.softmax), plain(data, mask, case.softmax))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_windows(kernel: Kernel, window: str, dtype: torch.dtype) -> None:
    check(kernel, WINDOWS[window], draw(WINDOWS[window], dtype))


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("widths", [(16, 16), (24, 16), (16, 40), (13, 7), (8, 4)])
def test_heads_and_widths(kernel: Kernel, heads: tuple[int, int], widths: tuple[int, int]) -> None:
    case = WINDOWS["band segments"].sized(heads=heads, widths=widths)
    check(kernel, case, draw(case, torch.bfloat16))


def test_two_tiles_merged_and_their_gradients_added(kernel: Kernel) -> None:
    case = Case((30,), (47,), heads=(6, 2), widths=(16, 24))
    data, mask = draw(case, torch.bfloat16), allowed(case)
    exact, yardstick = oracle(data, mask, case.softmax), plain(data, mask, case.softmax)
    assert_no_worse(two_tiles(kernel, data, 19, case.softmax), exact, yardstick)


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_virtual_ring(kernel: Kernel, order: str) -> None:
    case, mask = Case((50,), (50,)), Mask(Documents.from_bounds([0, 7, 8, 31, 50]), left=9)
    data, dense = draw(case, torch.bfloat16), dense_mask(mask)
    exact, yardstick = oracle(data, dense, case.softmax), plain(data, dense, case.softmax)
    assert_no_worse(virtual_ring(kernel, data, mask, order, 4, case.softmax), exact, yardstick)


@pytest.mark.parametrize("value_width", [12, 16])
def test_rows_of_a_packed_message(kernel: Kernel, value_width: int) -> None:
    """Keys and values side by side, as they arrive from another rank: width 12 and an odd start break the alignment."""
    case = Case((20,), (20,), right=0, heads=(4, 1), widths=(16, value_width))
    data = draw(case, torch.bfloat16)
    packed = torch.cat([data.k.flatten(1), data.v.flatten(1)], dim=1)
    shifted = torch.empty(packed.numel() + 1, dtype=packed.dtype)[1:].view(packed.shape).copy_(packed)
    for message in (packed, shifted):
        k, v = message.split([data.k[0].numel(), data.v[0].numel()], dim=1)
        check(kernel, case, data._replace(k=k.unflatten(1, data.k.shape[1:]), v=v.unflatten(1, data.v.shape[1:])))


def test_transposed_rows_and_sliced_statistics(kernel: Kernel) -> None:
    case = Case((20,), (20,), right=0)
    data = draw(case, torch.bfloat16)
    turned = Data(*(x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in data))
    check(kernel, case, turned)
    whole = compute(kernel, case, data)
    wide_HT = torch.full((4, 50), float("nan"))
    wide_HT[:, 11:31] = whole.lse
    grads = kernel.backward(
        data.dout, data.q, data.k, data.v, whole.out, wide_HT[:, 11:31], segments(case), case.softmax
    )
    assert all(torch.equal(found, want) for found, want in zip(grads, whole[2:], strict=True))


def test_a_gradient_of_stride_zero(kernel: Kernel) -> None:
    case = Case((20,), (20,), right=0)
    data = draw(case, torch.bfloat16)
    check(kernel, case, data._replace(dout=torch.ones((), dtype=torch.bfloat16).expand(data.dout.shape)))


def test_aligned_operands_are_not_copied() -> None:
    case = Case((20,), (20,), widths=(16, 16))
    data = draw(case, torch.bfloat16)
    fused = torch.cat([data.k, data.v], dim=2)
    views = (data.q, fused[..., :16], fused[..., 16:])
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(views, varlen.operands(*views), strict=True))


def test_softcap_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in fake_flash_attn.release("2.8.3").items():
        monkeypatch.setitem(sys.modules, name, module)
    case = Case((20,), (20,), right=0, softcap=0.7)
    check(FlashAttnKernel(), case, draw(case, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torch_itself_accepts_the_call(dtype: torch.dtype) -> None:
    """The real operators, on tensors without data: arguments bind, and shapes and dtypes are those of a kernel."""
    case = WINDOWS["band segments"].sized(widths=(20, 12))
    data = Data(*(x.to("meta") for x in draw(case, dtype)))
    result = compute(CudaFlashKernel(), case, data)
    assert result.out.shape == data.dout.shape and result.lse.shape == (4, 50) and result.lse.dtype == torch.float32
    assert [x.shape for x in result[2:]] == [x.shape for x in data[:3]]
    assert {x.dtype for x in (result.out, *result[2:])} == {dtype}


# Sabotage: what the comparison must not forgive. Each changes one thing that the adapters get right.


def _as_given(call: Segments) -> varlen.Bounds:
    """The arguments without the care that `bounds` takes."""
    left, right = call.window_size_left, call.window_size_right
    return varlen.Bounds(call.max_seqlen_q, call.max_seqlen_k, left < 0 and right == 0, left, right)


def _window_off_by_one(call: Segments) -> varlen.Bounds:
    given = varlen.bounds(call)
    return given._replace(left=given.left + 1, causal=False)


def _only_padded(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in tensors)


@pytest.mark.parametrize(
    ("name", "change", "window"),
    [
        ("bounds", _as_given, "ahead, more queries"),
        ("bounds", _as_given, "behind, more queries"),
        ("bounds", _as_given, "single queries"),
        ("bounds", _window_off_by_one, "band"),
        ("bounds", _window_off_by_one, "band segments"),
    ],
)
def test_sabotage_of_bounds(
    kernel: Kernel, name: str, change: object, window: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"hf_usp.kernels.cuda_flash.{name}", change)
    monkeypatch.setattr(f"hf_usp.kernels.flash_attn.{name}", change)
    with pytest.raises(AssertionError):
        check(kernel, WINDOWS[window], draw(WINDOWS[window], torch.bfloat16))


def test_sabotage_of_alignment(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_usp.kernels.cuda_flash.operands", _only_padded)
    monkeypatch.setattr("hf_usp.kernels.flash_attn.operands", _only_padded)
    case = Case((9,), (9,), widths=(12, 12))
    with pytest.raises(AssertionError, match="16"):
        check(kernel, case, draw(case, torch.bfloat16))


# Versions and installations.


def test_a_build_for_another_torch_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = fake_flash_attn.release("2.8.3")
    monkeypatch.setitem(sys.modules, "flash_attn", modules["flash_attn"])
    # What `import flash_attn.flash_attn_interface` meets is ImportError.
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", None)
    with pytest.raises(UspKernelError, match=r"does not import .* pip install flash-attn"):
        compute(FlashAttnKernel(), WINDOWS["causal"], draw(WINDOWS["causal"], torch.bfloat16))


@pytest.mark.parametrize("version", ["2.6.3", "3.0.0b1"])
def test_other_versions_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in fake_flash_attn.release(version).items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(UspKernelError, match=rf"flash-attn {version} is installed, versions 2.7 and 2.8"):
        compute(FlashAttnKernel(), WINDOWS["causal"], draw(WINDOWS["causal"], torch.bfloat16))


@pytest.mark.filterwarnings("ignore:usp. no flash attention")
def test_it_is_chosen_first_on_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in fake_flash_attn.release("2.8.3").items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu, bf16, softmax = torch.device("cuda"), torch.bfloat16, Softmax(0.1)
    assert choose_kernel(gpu, bf16, 128, softmax).name == "flash_attn"
    assert choose_kernel(gpu, bf16, 128, Softmax(0.1, softcap=30.0)).name == "flash_attn"
    assert choose_kernel(gpu, bf16, 128, softmax, "cuda_flash").name == "cuda_flash"
    assert choose_kernel(gpu, bf16, 257, softmax).name == "eager"
    assert choose_kernel(gpu, torch.float32, 128, softmax).name == "eager"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_kernel(gpu, bf16, 128, softmax).name == "eager"
    with pytest.raises(UspKernelError, match=r"compute capability 8\.0 .* has 7\.5"):
        choose_kernel(gpu, bf16, 128, softmax, "flash_attn")
