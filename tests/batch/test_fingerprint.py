"""Batches that differ in any bit are told apart, also where a sum would not notice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_usp
from hf_usp.batch.fingerprint import CHUNK, checksum, fingerprint, words

from ..ranks import Ranks

SHAPE, TYPES = (4, 16), [[0, 1, 0, 1, 1, 0, 1, 0], [1, 0, 0, 1, 0, 1, 1, 0]]
QUIET, OTHER = 0x7FC00000, 0x7FC00001  # two NaN
# Sums of values, or of places x values, are the same in most of them.
PAIRS: dict[str, tuple[Any, Any]] = {
    "tokens": (torch.tensor([[5, 9, 9, 5]]), torch.tensor([[6, 8, 8, 6]])),
    "token types": (torch.tensor(TYPES[:1]), torch.tensor(TYPES[1:])),
    "order": (torch.tensor([1, 0, 0, 1]), torch.tensor([0, 1, 1, 0])),
    "int32": (torch.tensor([5, 9, 9, 5], dtype=torch.int32), torch.tensor([6, 8, 8, 6], dtype=torch.int32)),
    "bool": (torch.tensor([True, False, False]), torch.tensor([False, True, False])),
    "embeddings": (torch.ones(1, 3, 4), torch.ones(1, 3, 4).index_fill(2, torch.tensor([2]), 1 + 2**-23)),
    "bfloat16": (torch.ones(1, 3, dtype=torch.bfloat16), torch.full((1, 3), 1 + 2**-7, dtype=torch.bfloat16)),
    "zeros": (torch.tensor([0.0]), torch.tensor([-0.0])),
    "NaN": (torch.tensor([QUIET], dtype=torch.int32), torch.tensor([OTHER], dtype=torch.int32)),
    "types": (torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.float64)),
    "shapes": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "gradients": (torch.zeros(2, 3), torch.zeros(2, 3, requires_grad=True)),
    "nested": ([torch.zeros(2), {"a": torch.ones(2)}], [torch.zeros(2), {"a": torch.zeros(2)}]),
    "numbers": (3, 4),
}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return torch.equal(fingerprint(a), fingerprint(b))


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_told_apart(name: str) -> None:
    first, second = PAIRS[name]
    if name == "NaN":
        first, second = first.view(torch.float32), second.view(torch.float32)
    assert same({"x": first}, {"x": first}) and not same({"x": first}, {"x": second})
    assert not same({"x": first}, {"y": first})


def test_changes_that_cancel_between_tensors() -> None:
    a, b = torch.tensor([[5, 9]]), torch.tensor([[9, 5]])
    assert not same({"input_ids": a, "labels": b}, {"input_ids": b, "labels": a})


def test_what_is_given_beside() -> None:
    batch = {"input_ids": torch.zeros(1, 4)}
    assert not torch.equal(fingerprint(batch, "zigzag"), fingerprint(batch, "balanced"))


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([2, 3, 64]), st.sampled_from([torch.int64, torch.int32, torch.bool]))
def test_random_differing_batches(seed: int, values: int, dtype: torch.dtype) -> None:
    """Few values, the same ones in another order, two of them moved: sums are often the same."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(values, SHAPE, generator=generator)
    others = [
        x.flatten()[torch.randperm(x.numel(), generator=generator)].view(SHAPE),
        x[torch.randperm(len(x), generator=generator)],
        x.roll(1, dims=1),
    ]
    for other in others:
        a, b = x.to(dtype), other.to(dtype)
        assert same({"x": a}, {"x": b}) == torch.equal(a, b)


def test_long_tensors_are_read_in_parts_to_the_end() -> None:
    x = torch.zeros(CHUNK + 3, dtype=torch.int64)
    y = x.clone()
    y[-1] = 1
    assert int(checksum(x)) != int(checksum(y))
    assert int(checksum(x)) != int(checksum(x[:-1]))


def test_bytes_of_any_tensor() -> None:
    """Also of parts of a storage, at any offset, and what is not laid out in order."""
    x = torch.arange(40, dtype=torch.int16)
    for part in (x[1:], x[3:8], x.view(5, 8).T, x[:0], x[2]):
        held = part.contiguous().view(-1).view(torch.uint8).tolist()
        assert words(part).view(torch.uint8).tolist()[: len(held)] == held
    for dtype in (torch.bool, torch.uint8, torch.uint16, torch.float16, torch.complex64, torch.float8_e4m3fn):
        assert words(torch.zeros(3, 3).to(dtype)).dtype == torch.int64


def refused(case: str) -> str:
    """The message of a rank about a batch that is another one on rank 1."""
    rank, mesh = torch.distributed.get_rank(), hf_usp.UspMesh.build(ring_degree=2, ulysses_degree=1)
    batch: dict[str, Any] = {"input_ids": torch.tensor([[5, 9, 9, 5]])}
    order = "zigzag" if case == "order" and rank else "auto"
    if case == "tokens" and rank:
        batch = {"input_ids": torch.tensor([[6, 8, 8, 6]])}
    if case == "embeddings":
        batch = {"inputs_embeds": torch.full((1, 4, 8), 1.0 + rank * 2**-20)}
    if case == "gradients":  # one rank would wait for the others in its backward
        batch = {"inputs_embeds": torch.zeros(1, 4, 8, requires_grad=rank == 1)}
    try:
        hf_usp.shard(batch, mesh, order=order)
    except hf_usp.UspBatchError as refusal:
        return str(refusal)
    return "accepted"


@pytest.mark.parametrize("case", ["tokens", "embeddings", "gradients", "order"])
def test_both_ranks_refuse(two_ranks: Ranks, case: str) -> None:
    assert all("rank(s) 1 differs from that of rank 0" in text for text in two_ranks.run(refused, case))
    assert two_ranks.run(refused, "nothing") == ["accepted", "accepted"]
