"""Kernel calls as named cases, and how a kernel's numbers are compared with the oracle's.

Shape suffixes: T packed query rows, K packed key rows, H query heads, G kv heads, D key width, E value width.

Used on CPU (tests/kernels) and on a GPU (tests/gpu); imports nothing but torch and hf_usp.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from hf_usp.kernels import Kernel, Segments, Softmax

from ..oracle import dense_attention, dense_lse


@dataclass(frozen=True)
class Case:
    """One variable-length call: lengths per segment, the window, heads (query, kv) and widths (key, value)."""

    lq: tuple[int, ...]
    lk: tuple[int, ...]
    left: int = -1
    right: int = -1
    heads: tuple[int, int] = (4, 2)
    widths: tuple[int, int] = (16, 16)
    softcap: float | None = None

    @property
    def softmax(self) -> Softmax:
        # Not the usual 1 / sqrt(D): an argument that is dropped must show.
        return Softmax(scale=0.9 * self.widths[0] ** -0.5, softcap=self.softcap)

    def sized(self, *, heads: tuple[int, int] | None = None, widths: tuple[int, int] | None = None) -> Case:
        return replace(self, heads=heads or self.heads, widths=widths or self.widths)

    def scaled(self, factor: int) -> Case:
        """The same shape of mask, `factor` times as long."""
        lengths = {"lq": tuple(n * factor for n in self.lq), "lk": tuple(n * factor for n in self.lk)}
        window = {"left": self.left * factor if self.left > 0 else self.left}
        # The first row of a segment with more queries than keys sees `right + lk - lq + 1` keys, at least one.
        window["right"] = self.right * factor if self.right > 0 else self.right
        return replace(self, **lengths, **window)


WINDOWS: dict[str, Case] = {
    "full": Case((40,), (40,)),
    "full, more keys": Case((24,), (61,)),
    "full, more queries": Case((61,), (24,)),
    "causal": Case((40,), (40,), right=0),
    "causal, more keys": Case((24,), (61,), right=0),
    "ahead": Case((40,), (40,), right=5),
    "ahead, more queries": Case((50,), (20,), right=33),
    "behind": Case((40,), (40,), left=7),
    "behind, more keys": Case((24,), (61,), left=7),
    "behind, more queries": Case((70,), (9,), left=2),
    "band": Case((300,), (300,), left=20, right=0),
    "band, both sides": Case((40,), (52,), left=6, right=4),
    "band, more queries": Case((70,), (9,), left=3, right=64),
    "causal segments": Case((8, 1, 23), (8, 5, 40), right=0),
    "band segments": Case((17, 3, 30), (20, 9, 11), left=4, right=19),
    "full segments": Case((8, 1, 23), (30, 2, 7)),
    "single queries": Case((1, 1, 1), (5, 1, 9)),
}
HEADS = {"mha": (3, 3), "gqa": (6, 2), "mqa": (5, 1)}


class Data(NamedTuple):
    """q_THD, k_KGD, v_KGE and the gradient of the output, dout_THE."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


class Result(NamedTuple):
    """out_THE, lse_HT and the gradients dq_THD, dk_KGD, dv_KGE."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def segments(case: Case, device: torch.device | str = "cpu") -> Segments:
    q_offsets, k_offsets = (tuple(accumulate(lengths, initial=0)) for lengths in (case.lq, case.lk))
    cu_seqlens_q, cu_seqlens_k = (
        torch.tensor(edges, dtype=torch.int32, device=device) for edges in (q_offsets, k_offsets)
    )
    return Segments(q_offsets, k_offsets, case.left, case.right, cu_seqlens_q, cu_seqlens_k)


def draw(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Data:
    """Random rows, drawn on the CPU so that every device gets the same."""
    torch.manual_seed(seed)
    (heads, kv_heads), (width, value_width) = case.heads, case.widths
    queries, keys = sum(case.lq), sum(case.lk)
    shapes = (
        (queries, heads, width),
        (keys, kv_heads, width),
        (keys, kv_heads, value_width),
        (queries, heads, value_width),
    )
    return Data(*(torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in shapes))


def allowed(case: Case) -> Tensor:
    """The mask [T, K] from the definition in `hf_usp.kernels.base`."""
    blocks = []
    for lq, lk in zip(case.lq, case.lk, strict=True):
        diagonal, column = torch.arange(lq)[:, None] + lk - lq, torch.arange(lk)
        block = torch.ones(lq, lk, dtype=torch.bool)
        if case.left >= 0:
            block &= column >= diagonal - case.left
        if case.right >= 0:
            block &= column <= diagonal + case.right
        blocks.append(block)
    return torch.block_diag(*blocks).bool()


def compute(kernel: Kernel, case: Case, data: Data) -> Result:
    """The kernel's forward and backward."""
    parts = segments(case, data.q.device)
    out_THE, lse_HT = kernel.forward(data.q, data.k, data.v, parts, case.softmax)
    grads = kernel.backward(data.dout, data.q, data.k, data.v, out_THE, lse_HT, parts, case.softmax)
    return Result(out_THE, lse_HT, *grads)


def oracle(data: Data, allowed_TK: Tensor, softmax: Softmax) -> Result:
    """The dense result of the same rounded inputs, in fp64."""
    q, k, v = (x.detach().double().requires_grad_() for x in data[:3])
    mask = allowed_TK.to(q.device)
    out = dense_attention(q[None], k[None], v[None], mask, softmax.scale, softmax.softcap)[0]
    lse = dense_lse(q[None], k[None], mask, softmax.scale, softmax.softcap)[0]
    grads = torch.autograd.grad(out, (q, k, v), data.dout.double())
    return Result(out.detach(), lse.detach(), *grads)


def plain(data: Data, allowed_TK: Tensor, softmax: Softmax) -> Result:
    """The result of plain torch in the dtype of the data: the yardstick for low precision."""
    q, k, v = (x.detach().clone().requires_grad_() for x in data[:3])
    groups = q.shape[1] // k.shape[1]
    scores = torch.einsum("thd,khd->htk", q, k.repeat_interleave(groups, 1)) * softmax.scale
    if softmax.softcap is not None:
        scores = softmax.softcap * torch.tanh(scores / softmax.softcap)
    scores = scores.masked_fill(~allowed_TK.to(q.device), float("-inf"))
    out = torch.einsum("htk,khe->the", scores.softmax(-1), v.repeat_interleave(groups, 1))
    grads = torch.autograd.grad(out, (q, k, v), data.dout)
    return Result(out.detach(), scores.detach().logsumexp(-1), *grads)


def errors(found: Result, exact: Result) -> dict[str, float]:
    """Largest error of each tensor, relative to its largest entry (lse: absolute). NaN counts as infinite."""
    sizes = {}
    for name, got, want in zip(Result._fields, found, exact, strict=True):
        assert got.shape == want.shape, f"{name}: {tuple(got.shape)} instead of {tuple(want.shape)}"
        error = (got.double() - want).abs().max().item() / (1.0 if name == "lse" else want.abs().max().item())
        sizes[name] = error if error == error else float("inf")
    return sizes


def assert_close(found: Result, exact: Result, tolerance: float) -> None:
    wrong = {name: error for name, error in errors(found, exact).items() if error > tolerance}
    assert not wrong, f"errors above {tolerance:.0e}: {wrong}"


def assert_no_worse(found: Result, exact: Result, yardstick: Result) -> dict[str, float]:
    """At most twice the error of plain torch in the same dtype. Returns the errors."""
    own, allowed_errors = errors(found, exact), errors(yardstick, exact)
    # One rounding of the result itself is always granted.
    grain = torch.finfo(found.out.dtype).eps
    wrong = {n: (own[n], allowed_errors[n]) for n in own if own[n] > 2 * allowed_errors[n] + grain / 2}
    assert not wrong, f"errors above twice those of plain torch: {wrong}"
    return own
