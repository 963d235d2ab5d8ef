"""The kernel contract: attention over packed segments, returning the output and its log-sum-exp.

Shape suffixes: T packed query rows, K packed key rows, H query heads, G kv heads (H a multiple of G; query head h
reads kv head h // (H // G)), D key width, E value width.

A *segment* is one tile: query rows q_offsets[i] .. q_offsets[i + 1] - 1 see key rows k_offsets[i] .. k_offsets[i + 1] -
1 under the shared window (window_size_left, window_size_right), -1 meaning no limit, aligned to the bottom right
corner: row a of a segment of lq queries and lk keys sees the columns c with a + lk - lq - left <= c <= a + lk - lq +
right. Every row sees at least one key, no segment is empty.

The backward takes the row's FINAL output and log-sum-exp, those of the softmax over all keys of all tiles, so that the
gradients of partial tiles simply add up (FlashAttention-2, arXiv 2307.08691, section 3; Ring Attention, arXiv
2310.01889).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Softmax:
    """From scores to weights: softmax(softcap * tanh(scale * q.k / softcap)).

    Attributes:
        scale: factor of q.k.
        softcap: bound of the scores; None: no bound.
    """

    scale: float
    softcap: float | None = None


@dataclass(frozen=True, eq=False)
class Segments:
    """The tiles of one variable-length call.

    Attributes:
        q_offsets: edges of the query segments, on the host [N + 1].
        k_offsets: edges of the key segments, on the host [N + 1].
        window_size_left: keys before the diagonal that a query sees; -1: no limit.
        window_size_right: keys after the diagonal that a query sees; -1: no limit, 0: causal.
        cu_seqlens_q: q_offsets as an int32 tensor on the device of the data.
        cu_seqlens_k: k_offsets as an int32 tensor on the device of the data.
    """

    q_offsets: tuple[int, ...]
    k_offsets: tuple[int, ...]
    window_size_left: int
    window_size_right: int
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor

    def __post_init__(self) -> None:
        # An empty segment ends the process inside torch's CPU operator; a row without keys has no softmax.
        assert len(self.q_offsets) == len(self.k_offsets) > 1, "every segment has queries and keys"
        for lq, lk in zip(_lengths(self.q_offsets), _lengths(self.k_offsets), strict=True):
            assert lq > 0 and lk > 0, "no segment is empty"
            assert self.window_size_right < 0 or lk - lq + self.window_size_right >= 0, (
                "every row sees at least one key"
            )

    @property
    def max_seqlen_q(self) -> int:
        return max(_lengths(self.q_offsets))

    @property
    def max_seqlen_k(self) -> int:
        return max(_lengths(self.k_offsets))


def _lengths(edges: tuple[int, ...]) -> list[int]:
    return [stop - start for start, stop in pairwise(edges)]


@dataclass(frozen=True)
class Request:
    """The call that a kernel is asked to compute, as far as it can be known before there are segments.

    Attributes:
        device: of the tensors.
        dtype: of queries, keys, values and the output.
        head_dim: key width D.
        value_dim: value width E.
        softmax: from scores to weights.
        named: whether the user named the kernel, which may then be downloaded.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    softmax: Softmax
    named: bool = False

    @property
    def widths(self) -> str:
        return f"{self.head_dim}" if self.head_dim == self.value_dim else f"{self.head_dim} (values {self.value_dim})"


class Kernel(Protocol):
    """One way to compute segments. Stateless, but for functions of other packages that `why_not` has found."""

    name: str

    def why_not(self, request: Request) -> str | None:
        """None when this kernel computes such a call exactly here; else the reason, with the remedy if there is one.

        The reason of a package that is missing ends in the command that installs it, after ": ".
        """

    def forward(
        self, q_THD: Tensor, k_KGD: Tensor, v_KGE: Tensor, segments: Segments, softmax: Softmax
    ) -> tuple[Tensor, Tensor]:
        """Returns out_THE in the dtype of q and lse_HT in fp32 (fp64 for fp64), natural logarithm, scale included."""

    def backward(
        self,
        dout_THE: Tensor,
        q_THD: Tensor,
        k_KGD: Tensor,
        v_KGE: Tensor,
        out_THE: Tensor,
        lse_HT: Tensor,
        segments: Segments,
        softmax: Softmax,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns dq_THD, dk_KGD, dv_KGE of these segments, given the rows' final output and log-sum-exp."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of log-sum-exp and of sums over tiles: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
