"""Arrays that travel in one copy arrive as they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_usp.batch.documents import find_documents
from hf_usp.batch.layout import MaskSpec, make_layout
from hf_usp.distributed.mesh import UspMesh
from hf_usp.utils.upload import ALIGNED, download, upload, upload_fields

CPU = torch.device("cpu")
DTYPES = st.sampled_from([np.int64, np.int32, np.bool_])
SHAPES = st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple)


@given(st.lists(st.tuples(DTYPES, SHAPES), max_size=6), st.integers(0, 99))
def test_values_shapes_and_dtypes_stay(kinds: list[tuple[Any, tuple[int, ...]]], seed: int) -> None:
    draw = np.random.default_rng(seed)
    arrays = [draw.integers(0, 2 if dtype is np.bool_ else 9, shape).astype(dtype) for dtype, shape in kinds]
    moved = upload(arrays, CPU)
    assert len(moved) == len(arrays)
    for array, tensor in zip(arrays, moved, strict=True):
        assert tensor.numpy().dtype == array.dtype and tensor.shape == array.shape
        np.testing.assert_array_equal(tensor.numpy(), array)
        assert tensor.storage_offset() * tensor.element_size() % ALIGNED == 0 and tensor.is_contiguous()
    assert len({tensor.untyped_storage().data_ptr() for tensor in moved if tensor.numel()}) <= 1


@dataclass(frozen=True)
class Inner:
    numbers: tuple[int, ...]
    index: Tensor | slice


@dataclass(frozen=True)
class Outer:
    parts: tuple[Inner, ...]
    none: tuple[Inner, ...]
    index: Tensor


def test_only_tensors_are_replaced() -> None:
    every = slice(None)
    same = torch.arange(3)
    before = Outer((Inner((1, 2), same), Inner((), every)), (), same)
    after = upload_fields(before, CPU)
    assert after.parts[1].index is every and after.parts[0].numbers is before.parts[0].numbers and after.none == ()
    assert after.index is after.parts[0].index is not same and torch.equal(after.index, same)


@pytest.mark.parametrize("kind", [MaskSpec(), MaskSpec(window_left=7)])
def test_a_schedule_is_one_copy(monkeypatch: pytest.MonkeyPatch, kind: MaskSpec) -> None:
    """Of documents whose tiles need tensors of numbers: before there were 4 to 16 of them."""
    mesh = UspMesh(4, 1, 1, 0, (0, 1, 2, 3), None, None, None)
    positions = torch.tensor([[*range(20), *range(13), *range(31)]])
    layout = make_layout(find_documents(1, 64, None, positions), 1, 64, mesh)
    made = []
    stock = Tensor.to
    monkeypatch.setattr(
        Tensor, "to", lambda self, *args, **keywords: made.append(self) or stock(self, *args, **keywords)
    )
    schedule = layout.device_schedule(kind, CPU)
    assert len(made) == 1 and made[0].dtype == torch.uint8
    calls = [call for stage in schedule.stages for call in stage.calls]
    assert len(calls) > 1 and all(call.segments.cu_seqlens_q.dtype == torch.int32 for call in calls)
    assert all(call.segments.cu_seqlens_q.tolist() == list(call.segments.q_offsets) for call in calls)


def test_what_the_host_reads_comes_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [torch.arange(3), None, torch.tensor(True), torch.ones(2, 5, dtype=torch.int32).T, torch.zeros(0)]
    made = []
    stock = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: made.append(self) or stock(self))
    found = download(given)
    assert len(made) == 1 and found[1] is None
    for before, after in zip(given, found, strict=True):
        if before is not None and after is not None:
            np.testing.assert_array_equal(after, before.numpy())
            assert after.dtype == before.numpy().dtype
