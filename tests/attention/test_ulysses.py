"""The exchange of heads for tokens: equal shares, copied at once, move as shares of any size do, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_usp
from hf_usp.attention import ulysses
from hf_usp.batch.context import AttentionShape
from hf_usp.batch.layout import MaskSpec
from hf_usp.sharding.heads import split_heads

ROWS, LENGTH, WIDTH, VALUE_WIDTH = 2, 3, 4, 6


class Wire:
    """Keeps what is sent, with the sizes in numbers, and delivers random numbers that depend on their count alone."""

    def __init__(self) -> None:
        self.sent: list[tuple[Tensor, list[int], list[int]]] = []

    def all_to_all(self, send: Tensor, sizes: Sequence[int], received: Sequence[int], group: Any) -> Tensor:
        each = send.shape[1:].numel()
        self.sent.append((send.reshape(-1).clone(), [n * each for n in sizes], [n * each for n in received]))
        generator = torch.Generator().manual_seed(0)
        return torch.randn(sum(received), *send.shape[1:], generator=generator).to(send.dtype)


def exchanged(heads: ulysses.Heads) -> list[Tensor]:
    """Results of the four functions, on inputs that depend on the shapes alone."""
    torch.manual_seed(0)
    shape, mine, tokens = heads.shape, heads.mine, ROWS * LENGTH * heads.mesh.ulysses_degree
    q = torch.randn(ROWS, shape.heads, LENGTH, WIDTH).transpose(1, 2)
    k, v = (torch.randn(ROWS, LENGTH, shape.kv_heads, width) for width in (WIDTH, VALUE_WIDTH))
    local = ((mine.num_query, WIDTH), (mine.num_kv, WIDTH), (mine.num_kv, VALUE_WIDTH))
    arrived = ulysses.gather_seq_scatter_heads(q, k, v, heads)
    assert arrived is not None
    return [
        arrived,
        ulysses.gather_heads_scatter_seq(torch.randn(tokens, mine.num_query, VALUE_WIDTH), heads),
        ulysses.gather_heads_scatter_seq_backward(torch.randn(ROWS, LENGTH, shape.heads, VALUE_WIDTH), heads),
        *ulysses.gather_seq_scatter_heads_backward([torch.randn(tokens, *x) for x in local], heads, torch.bfloat16),
    ]


@pytest.mark.parametrize(
    "degree, heads, kv_heads, copies",
    [
        (2, 8, 8, 1),
        (4, 4, 4, 1),
        (2, 8, 1, 2),
        (4, 8, 2, 2),
        (3, 24, 12, 1),
        (8, 24, 4, 2),
        (3, 8, 2, None),
        (4, 6, 2, None),
    ],
    ids=str,
)
def test_equal_shares_move_as_any_do(
    degree: int, heads: int, kv_heads: int, copies: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, group = AttentionShape(MaskSpec(), heads, kv_heads, WIDTH, VALUE_WIDTH, torch.float32), object()
    for rank in range(degree):
        mesh = hf_usp.UspMesh(1, degree, 0, rank, tuple(range(degree)), None, group, None)  # type: ignore[arg-type]
        found = []
        for alike in (True, False):
            call = ulysses.Heads(split_heads(heads, kv_heads, degree), mesh, ROWS, shape)
            assert call.copies == (None if copies is None else (1, copies, copies))
            if not alike:
                object.__setattr__(call, "copies", None)
            wire = Wire()
            monkeypatch.setattr(ulysses, "all_to_all", wire.all_to_all)
            found.append((exchanged(call), wire.sent))
        (results, sent), (expected, expected_sent) = found
        assert len(sent) == len(expected_sent) == 4
        assert results[1].is_contiguous(), "models view the output as [B, L, H * E]"
        for (message, *sizes), (expected_message, *expected_sizes) in zip(sent, expected_sent, strict=True):
            assert torch.equal(message, expected_message) and sizes == expected_sizes
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
