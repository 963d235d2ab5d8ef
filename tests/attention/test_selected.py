"""Attention over selected keys against the dense fp64 oracle, in chunks of any size; and what a chunk may be large."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_usp.attention import selected
from hf_usp.attention.selected import Selection, attend_to_selected

from ..oracle import dense_attention

B, H, G, L, S, D, E, K = 2, 4, 2, 7, 12, 6, 4, 5


def selection_of(groups: int, length: int = L, keys: int = S, chosen: int = K) -> Selection:
    """Distinct keys in any order, some none; the first query sees nothing, others an interval."""
    generator = torch.Generator().manual_seed(1)
    index = torch.rand(B, groups, length, keys, generator=generator).argsort(-1)[..., :chosen]
    index[:, :, 1:, -1] = -1
    last = torch.arange(length).expand(B, -1) + keys - length
    first = torch.tensor([[0], [2]]).expand(-1, length).clone()
    last = last.clone()
    last[:, 0] = 0
    return Selection(index.to(torch.int32), first, last)


def allowed_by(selection: Selection, keys: int) -> Tensor:
    """Which keys each query attends to [B, X, L, S]."""
    index = selection.index.long()
    chosen = torch.zeros(*index.shape[:3], keys + 1, dtype=torch.bool)
    chosen = chosen.scatter(-1, index.masked_fill(index < 0, keys), True)[..., :keys]
    place = torch.arange(keys)
    seen = (place >= selection.first[..., None]) & (place < selection.last[..., None])
    return chosen & seen[:, None]


def inputs(latents: bool, sinks: bool) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = [(B, H, L, D), (B, G, S, D), (B, G, S, E)]
    tensors = [torch.randn(size, dtype=torch.float64) for size in sizes[: 2 if latents else 3]]
    return [x.requires_grad_() for x in (*tensors, *([torch.randn(H, dtype=torch.float64)] if sinks else []))]


@pytest.mark.parametrize("chunk", [1, 3 * B * K * G * D, 2**26], ids=["one query", "three", "all"])
@pytest.mark.parametrize("groups", [1, G], ids=["one selection", "one a kv head"])
@pytest.mark.parametrize("latents", [False, True], ids=["values", "latents"])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_output_and_gradients(
    monkeypatch: pytest.MonkeyPatch, chunk: int, groups: int, latents: bool, sinks: bool
) -> None:
    monkeypatch.setattr(selected, "CHUNK_NUMBERS", chunk)
    selection, mine, theirs = selection_of(groups), inputs(latents, sinks), inputs(latents, sinks)
    q, k, *rest = mine
    out = attend_to_selected(q, k, E if latents else rest[0], rest[-1] if sinks else None, selection, 0.3)
    q, k, *rest = theirs
    v = k[..., :E] if latents else rest[0]
    allowed = allowed_by(selection, S).expand(-1, G, -1, -1)
    expected = []  # the oracle takes one mask for all heads
    for g in range(G):
        heads = slice(g * H // G, (g + 1) * H // G)
        one = [x.transpose(1, 2) for x in (q[:, heads], k[:, g : g + 1], v[:, g : g + 1])]
        expected.append(dense_attention(*one, allowed[:, g], 0.3, sinks=rest[-1][heads] if sinks else None))
    whole = torch.cat(expected, dim=2).transpose(1, 2)
    torch.testing.assert_close(out, whole)
    assert not out[:, :, 0].any()  # a query that sees nothing
    slope = torch.randn_like(out)
    for name, got, want in zip(
        "qkvs", torch.autograd.grad(out, mine, slope), torch.autograd.grad(whole, theirs, slope), strict=False
    ):
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"gradient of {name}: {text}")


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that a program makes; views do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known:
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_no_tensor_is_larger_than_a_chunk_or_an_input(monkeypatch: pytest.MonkeyPatch) -> None:
    length = keys = 64
    monkeypatch.setattr(selected, "CHUNK_NUMBERS", 2 * B * 16 * G * D)  # two queries
    torch.manual_seed(0)
    q, k = (torch.randn(B, n, length, D, requires_grad=True) for n in (H, G))
    selection = selection_of(1, length, keys, 16)
    with Largest() as seen:
        attend_to_selected(q, k, E, None, selection, 0.3).sum().backward()
    assert seen.numbers <= max(q.numel(), 2 * B * 16 * G * D), seen.numbers
