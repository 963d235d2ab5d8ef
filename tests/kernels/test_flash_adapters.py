"""Every CUDA kernel and every argument that it passes, without a GPU: one harness for all dialects.

`fake_flash_attn`, `fake_fa3` and `fake_fa4` stand in for the packages, `fake_aten` for torch's flash operators,
`fake_dense` for torch's dense ones; torch's own replacements of its flash operators run as they are, around the
stand-ins. All end in `stand_in` or `eager`, which check and compute as the real code does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import _fa3, _fa4

from hf_usp.kernels import Kernel, Segments, Softmax, dialects
from hf_usp.kernels.blockwise import BlockwiseKernel
from hf_usp.kernels.cudnn import CudnnKernel
from hf_usp.kernels.dialects import FA2, FA3, FA4, Functions, arguments, torch_dialect
from hf_usp.kernels.efficient import EfficientKernel
from hf_usp.kernels.flash import FlashKernel, operand
from hf_usp.kernels.pieces import cut
from hf_usp.sharding.masks import Documents, Mask

from ..attention.virtual_ring import dense_mask, two_tiles, virtual_ring
from . import fake_aten, fake_dense, fake_fa3, fake_fa4, fake_flash_attn, stand_in
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
    segments,
)

Patch = pytest.MonkeyPatch


def install(patch: Patch, modules: dict[str, object]) -> None:
    for name, module in modules.items():
        patch.setitem(sys.modules, name, module)


def fa2(patch: Patch, version: str) -> Kernel:
    install(patch, fake_flash_attn.release(version))
    return FlashKernel("flash_attn", lambda: FA2)


def fa3(patch: Patch, build: str) -> Kernel:
    found = fake_fa3.operators("flash_attn_3_older" if build == "older" else "flash_attn_3", build == "older")
    patch.setattr("hf_usp.kernels.packages._spec", lambda name: name)
    patch.setattr("hf_usp.kernels.packages.import_flash_attn_3", lambda: found)
    return FlashKernel("fa3", lambda: FA3)


def fa3_of_the_hub(patch: Patch, _: str) -> Kernel:
    patch.setattr("hf_usp.kernels.packages._spec", lambda name: name if name == "kernels" else None)
    install(patch, {"kernels": fake_fa3.hub()})
    return FlashKernel("fa3", lambda: FA3)


def fa4(patch: Patch, version: str) -> Kernel:
    release, _, major = version.partition(" on ")
    return FlashKernel("fa4", lambda: FA4, Functions(*fake_fa4.functions(release, int(major))), int(major))


def torchs(patch: Patch, impl: str) -> Kernel:
    """torch's own functions, around the stand-ins for the packages that they call."""
    patch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: impl)
    for module, name in ((_fa3, "fa3"), (_fa4, "fa4")):
        patch.setattr(module, f"_{name}_common_support_error", lambda *args, **kwargs: None)
    if impl == "FA3":
        operators = fake_fa3.operators("flash_attn_3")
        patch.setattr(_fa3, "_FA3_CUDA_FWD", lambda *args: operators.fwd(*args[:-3], args[-3] or 1, *args[-2:]))
        patch.setattr(_fa3, "_FA3_CUDA_BWD", operators.bwd)
        functions = _fa3._fa3_flash_attention_forward_impl_default, _fa3._fa3_flash_attention_backward_impl
    else:
        # Names that torch 2.13 knows; the test below has the releases that it does not know.
        modules = fake_fa4.release("4.0.0b18" if dialects.is_older("torch", "2.14.0.dev0") else "4.0.0b36")
        patch.setattr(_fa4, "_FA4_MODULE_PATH", "flash_attn.cute.interface")
        patch.setattr(_fa4, "_fa4_import_module", lambda path: modules[path])
        patch.setattr(_fa4, "_get_device_major", lambda device: 9)
        functions = _fa4._fa4_flash_attention_forward_impl, _fa4._fa4_flash_attention_backward_impl
    return FlashKernel("cuda_flash", torch_dialect, Functions(*functions), 9)


def cudnn(patch: Patch, _: str) -> Kernel:
    """Segments from four keys on, multiples of four, by cuDNN; the others by FlashAttention 2."""
    for name, value in (("LEAST", 4), ("UNIT", 4)):
        patch.setattr(f"hf_usp.kernels.cudnn.{name}", value)
    operators = fake_dense.cudnn_forward, fake_dense.cudnn_backward
    return CudnnKernel((fake_aten.kernel(),), operators)


def efficient(patch: Patch, _: str) -> Kernel:
    return EfficientKernel(BlockwiseKernel(), (fake_dense.efficient_forward, fake_dense.efficient_backward))


MAKERS: dict[str, Callable[[Patch, str], Kernel]] = {
    "flash_attn 2.7.0.post2": fa2,
    "flash_attn 2.8.3": fa2,
    "flash_attn 2.8.4": fa2,
    "aten ": lambda patch, _: fake_aten.kernel(),
    "fa3 main": fa3,
    "fa3 older": fa3,
    "fa3 hub": fa3_of_the_hub,
    "fa4 4.0.0b30 on 9": fa4,
    "fa4 4.0.0b36 on 9": fa4,
    "fa4 4.0.0b36 on 10": fa4,
    "torchs FA3": torchs,
    "cudnn ": cudnn,
    "efficient ": efficient,
    "blockwise ": lambda patch, _: BlockwiseKernel(),
}
# torch 2.11 and 2.12 know no windows of FA4; hf_usp refuses torch's FA4 before 2.14, as the test of its results shows.
WITHOUT_WINDOWS = dialects.is_older("torch", "2.13.0")
if not WITHOUT_WINDOWS:
    MAKERS["torchs FA4"] = torchs


@pytest.fixture(params=MAKERS)
def kernel(request: pytest.FixtureRequest, monkeypatch: Patch) -> Kernel:
    return MAKERS[request.param](monkeypatch, request.param.partition(" ")[2])


def check(kernel: Kernel, case: Case, data: Data) -> None:
    mask = allowed(case)
    assert_no_worse(compute(kernel, case, data), oracle(data, mask, case.softmax), plain(data, mask, case.softmax))


@pytest.mark.parametrize("window", WINDOWS)
def test_windows(kernel: Kernel, window: str) -> None:
    dtype = torch.float16 if "segments" in window else torch.bfloat16
    check(kernel, WINDOWS[window], draw(WINDOWS[window], dtype))


WIDTHS = [(16, 16), (24, 16), (16, 40), (13, 7), (8, 4), (136, 136), (192, 128), (160, 100), (128, 72)]


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_heads_and_widths(kernel: Kernel, heads: tuple[int, int]) -> None:
    """All widths that the kernel takes; MLA's as they are, where the kernel has them."""
    for widths in WIDTHS:
        if isinstance(kernel, FlashKernel) and FA4.widths(kernel._major or 8, *widths) is None:
            continue  # (136, 136) on Blackwell; `test_registry.py` has the refusals
        case = WINDOWS["band segments"].sized(heads=heads, widths=widths)
        check(kernel, case, draw(case, torch.bfloat16))


def test_two_tiles_merged_and_their_gradients_added(kernel: Kernel) -> None:
    """Each tile's backward gets a log-sum-exp that covers more keys than the tile has."""
    case = Case((30,), (48,), heads=(6, 2), widths=(16, 24))
    data, mask = draw(case, torch.bfloat16), allowed(case)
    exact, yardstick = oracle(data, mask, case.softmax), plain(data, mask, case.softmax)
    assert_no_worse(two_tiles(kernel, data, 20, case.softmax), exact, yardstick)


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("left", [9, -1])
def test_virtual_ring(kernel: Kernel, order: str, left: int) -> None:
    case, mask = Case((50,), (50,)), Mask(Documents.from_bounds([0, 7, 8, 32, 50]), left=left)
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
    data = draw(Case((20,), (20,), widths=(16, 16)), torch.bfloat16)
    fused = torch.cat([data.k, data.v], dim=2)
    for view in (data.q, fused[..., :16], fused[..., 16:]):
        assert operand(view, 16).data_ptr() == view.data_ptr()


@pytest.mark.parametrize("name", ["flash_attn 2.8.3", "fa3 main", "fa4 4.0.0b36 on 10", "blockwise "])
def test_softcap(name: str, monkeypatch: Patch) -> None:
    case = Case((20,), (20,), right=0, softcap=0.7)
    check(MAKERS[name](monkeypatch, name.partition(" ")[2]), case, draw(case, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torch_itself_accepts_the_call(dtype: torch.dtype, monkeypatch: Patch) -> None:
    """The real operators, on tensors without data: arguments bind, and shapes and dtypes are those of a kernel.

    torch's description of the memory-efficient backward lacks an argument that its schema has, so its forward alone.
    """
    monkeypatch.setattr("hf_usp.kernels.cudnn.LEAST", 4)
    flash = FlashKernel("cuda_flash", torch_dialect, Functions(*dialects.cuda_flash_operators()))
    square = Case((1024,), (1024,), right=0, widths=(20, 12))
    for kernel, case in ((flash, WINDOWS["band segments"].sized(widths=(20, 12))), (CudnnKernel((flash,)), square)):
        data = Data(*(x.to("meta") for x in draw(case, dtype)))
        result = compute(kernel, case, data)
        rows = len(data.q)
        assert result.out.shape == data.dout.shape and result.lse.shape == (4, rows)
        assert result.lse.dtype == torch.float32 and {x.dtype for x in (result.out, *result[2:])} == {dtype}
        assert [x.shape for x in result[2:]] == [x.shape for x in data[:3]]
    data = Data(*(x.to("meta") for x in draw(square, dtype)))
    out, lse = EfficientKernel(flash).forward(*data[:3], segments(square, "meta"), square.softmax)
    assert out.shape == data.dout.shape and lse.shape == (4, 1024)


def test_float32_and_wide_heads_by_the_memory_efficient_operator(monkeypatch: Patch) -> None:
    """Inputs that FlashAttention refuses: float32 is exact to its own precision, width 512 as wide as it is."""
    kernel = efficient(monkeypatch, "")
    for case in WINDOWS.values():
        data = draw(case, torch.float32)
        found = compute(kernel, case, data)
        assert_close(found, oracle(data, allowed(case), case.softmax), 2e-6)
    wide = WINDOWS["causal segments"].sized(widths=(512, 320), heads=(4, 2))
    check(kernel, wide, draw(wide, torch.bfloat16))


# Which segments cuDNN computes.


@pytest.mark.parametrize(
    ("case", "by_cudnn"),
    [
        (Case((2048,), (2048,), right=0), ["causal 2048"]),
        (Case((2048,), (4096,)), ["full 2048"]),
        (Case((2048,), (4096,), right=0), []),
        (Case((4096,), (2048,), right=2048), []),
        (Case((2048,), (2048,), left=512, right=0), []),
        (Case((2048, 100, 1500, 1024), (2048, 100, 1500, 1024), right=0), ["causal 2048", "causal 1024"]),
        (Case((512,), (512,), right=0), []),
        (Case((40_001,), (32_768,)), ["full 40001"]),
    ],
    ids=str,
)
def test_segments_of_cudnn(case: Case, by_cudnn: list[str]) -> None:
    """Squares and rectangles whose shape repeats; each other run of segments is one call of FlashAttention 2."""
    taken: list[str] = []
    others: list[tuple[int, ...]] = []

    class Other(FlashKernel):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, parts: Segments, softmax: Softmax) -> tuple[Tensor, Tensor]:
            others.append(parts.q_offsets)
            assert (parts.cu_seqlens_q.tolist(), parts.cu_seqlens_k.tolist()) == (
                [*parts.q_offsets],
                [*parts.k_offsets],
            )
            assert (len(q), len(k)) == (parts.q_offsets[-1], parts.k_offsets[-1])
            return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[1], len(q), dtype=torch.float32)

    def forward(q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        taken.append(f"{'causal' if args[3] else 'full'} {q.shape[2]}")
        return torch.empty(*q.shape[:3], v.shape[3], device=q.device, dtype=q.dtype), q.new_empty(
            1, q.shape[1], q.shape[2], 1, dtype=torch.float32
        )

    kernel = CudnnKernel((Other("other", lambda: FA2),), (forward, forward))
    q, k = (torch.empty(sum(lengths), 2, 8, dtype=torch.bfloat16) for lengths in (case.lq, case.lk))
    out, lse = kernel.forward(q, k, k, segments(case), case.softmax)
    assert taken == by_cudnn and out.shape[0] == lse.shape[1] == sum(case.lq)
    if len(case.lq) == 4:
        assert others == [(0, 100, 1600)], "the segments between two of cuDNN's are one call"


# Windows, exhaustively: what the devices see is what the contract says, for one and for two segments of a call.


def bounds(lq: int, lk: int, left: int, right: int) -> list[tuple[int, int]]:
    """The keys [lo, hi) that each row sees."""
    diagonal = range(lk - lq, lk)
    return [(max(0, d - left) if left >= 0 else 0, min(lk, d + right + 1) if right >= 0 else lk) for d in diagonal]


def calls() -> Iterator[tuple[list[tuple[int, int]], Segments]]:
    none = torch.empty(0)
    for q1, k1, q2, k2 in (
        (q, k, p, c) for q in range(1, 6) for k in range(1, 6) for p in (1, 3, 6) for c in (1, 4, 7)
    ):
        for left in range(-1, 8):
            for right in range(-1, 8):
                if right >= 0 and min(k1 - q1, k2 - q2) + right < 0:
                    continue  # a row without keys
                yield [(q1, k1), (q2, k2)], Segments((0, q1, q1 + q2), (0, k1, k1 + k2), left, right, none, none)


@pytest.mark.parametrize("family", stand_in.WINDOWS_OF)
def test_every_window_is_seen_as_it_is_meant(family: str) -> None:
    number = 0
    for shapes, parts in calls():
        given = arguments(parts, Softmax(1.0))
        ends = (None if end < 0 and family == "fa4" else end for end in (given.left, given.right))
        longest = given.max_seqlen_q, given.max_seqlen_k
        seen = stand_in.WINDOWS_OF[family](given.causal, *ends, *longest)
        for lq, lk in shapes:
            want = bounds(lq, lk, parts.window_size_left, parts.window_size_right)
            assert bounds(lq, lk, *seen) == want, f"{lq} x {lk}: {given} is seen as {seen}"
        number += 1
    assert number > 8000


# Sabotage: what the comparison must not forgive. Each changes one thing that the kernels get right.

FLASH = ["flash_attn 2.8.3", "aten ", "fa3 main", "fa4 4.0.0b36 on 9"]


def _as_given(call: Segments, softmax: Softmax) -> dialects.Arguments:
    """The arguments without the care that `arguments` takes."""
    longest = {"max_seqlen_q": call.max_seqlen_q, "max_seqlen_k": call.max_seqlen_k}
    return arguments(call, softmax)._replace(**longest)


def _window_off_by_one(call: Segments, softmax: Softmax) -> dialects.Arguments:
    given = arguments(call, softmax)
    return given._replace(left=given.left + 1, causal=False)


@pytest.mark.parametrize(
    ("name", "change", "window"),
    [
        ("flash_attn 2.8.3", _as_given, "ahead, more queries"),
        ("aten ", _as_given, "behind, more queries"),
        ("flash_attn 2.8.3", _as_given, "single queries"),
        *((name, _window_off_by_one, window) for name in FLASH for window in ("band", "band segments")),
    ],
)
def test_sabotage_of_arguments(name: str, change: object, window: str, monkeypatch: Patch) -> None:
    kernel = MAKERS[name](monkeypatch, name.partition(" ")[2])
    monkeypatch.setattr("hf_usp.kernels.flash.arguments", change)
    with pytest.raises(AssertionError):
        check(kernel, WINDOWS[window], draw(WINDOWS[window], torch.bfloat16))


def test_sabotage_of_no_limit_in_fa4() -> None:
    """FA4 takes -1 for a bound where the others mean no limit."""
    forward, backward = fake_fa4.functions("4.0.0b36")

    def minus_one(**given: object) -> object:
        sides = ("window_size_left", "window_size_right")
        return forward(**given | {side: -1 for side in sides if given[side] is None})

    kernel = FlashKernel("fa4", lambda: FA4, Functions(minus_one, backward), 9)
    with pytest.raises(AssertionError, match="a negative bound"):
        check(kernel, WINDOWS["behind"], draw(WINDOWS["behind"], torch.bfloat16))


@pytest.mark.parametrize("name", [*FLASH, "cudnn ", "efficient "])
def test_sabotage_of_alignment(name: str, monkeypatch: Patch) -> None:
    kernel = MAKERS[name](monkeypatch, name.partition(" ")[2])
    for module in ("flash", "cudnn", "efficient"):
        monkeypatch.setattr(f"hf_usp.kernels.{module}.operand", lambda x, width: x.contiguous())
    case = Case((8,), (8,), widths=(12, 12))
    with pytest.raises(AssertionError, match="16|alignment|multiple of 8"):
        check(kernel, case, draw(case, torch.bfloat16))


def test_sabotage_of_the_other_corner(monkeypatch: Patch) -> None:
    """cuDNN's causal is aligned to the top left: a rectangle must not reach it."""
    kernel = cudnn(monkeypatch, "")
    monkeypatch.setattr("hf_usp.kernels.cudnn._pieces", lambda parts: list(cut(parts, lambda queries, keys: True)))
    case = Case((8,), (16,), right=0)
    with pytest.raises(AssertionError, match="in the other corner"):
        check(kernel, case, draw(case, torch.bfloat16))


def test_torch_before_2_14_does_not_know_the_results_of_fa4(monkeypatch: Patch) -> None:
    """torch's own function with the releases that hf_usp supports: `_torch_fa4` says what it does."""
    kernel = torchs(monkeypatch, "FA4")
    old = dialects.is_older("torch", "2.14.0.dev0")
    case = WINDOWS["causal"]
    for version in ("4.0.0b19", "4.0.0b36"):
        modules = fake_fa4.release(version)
        monkeypatch.setattr(_fa4, "_fa4_import_module", lambda path, modules=modules: modules[path])
        if old:
            known = AssertionError if WITHOUT_WINDOWS else ValueError
            with pytest.raises(known, match="a negative bound" if WITHOUT_WINDOWS else "too many values to unpack"):
                compute(kernel, case, draw(case, torch.bfloat16))
        else:
            check(kernel, case, draw(case, torch.bfloat16))
    refused = dialects.torch_dialect().load(False)  # type: ignore[union-attr]
    assert isinstance(refused, str) and ("torch>=2.14" in refused) == old


def test_fa3_never_splits_keys_by_itself(monkeypatch: Patch) -> None:
    """`num_splits=0`, the default of its operator, keeps partial outputs in fp32: the stand-in refuses it."""
    operators = fake_fa3.operators("flash_attn_3")
    row = replace(
        FA3, forward=lambda f, q, k, v, given: f(q=q, k=k, v=v, **dialects._common(given, "is_causal", -1))[:2]
    )
    kernel = FlashKernel("fa3", lambda: row, Functions(operators.fwd, operators.bwd))
    with pytest.raises(AssertionError, match="partial outputs"):
        check(kernel, WINDOWS["causal"], draw(WINDOWS["causal"], torch.bfloat16))
