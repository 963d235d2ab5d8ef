"""Merging the results of tiles, in place: the softmax over more keys, and sums of gradients.

Shape suffixes: T query rows or key rows, H heads, D width, E value width.

Merges that are not needed are skipped: the first tile of a row is copied, and a tile that covers every row is returned
directly. With at most two parts the merge rounds once, so the accumulator can stay in the dtype of the input; with more
it is fp32 (`WriteCounts.max_parts`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch.device_schedule import EVERY, NONE, DeviceSchedule, Index, KernelCall, WriteCounts
from ..kernels import accumulation_dtype


class OnlineSoftmax:
    """Output and log-sum-exp of the tiles so far.

    exact: keep the output in fp32 (fp64 for fp64) also where no more than two tiles meet.
    """

    def __init__(self, q_THD: Tensor, width: int, work: DeviceSchedule, *, exact: bool) -> None:
        self._shape, self._like, self._work = (*q_THD.shape[:2], width), q_THD, work
        self._acc = accumulation_dtype(q_THD.dtype)
        self._dtype = self._acc if exact or work.rows.max_parts > 2 else q_THD.dtype
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def add(self, out: Tensor, lse: Tensor, call: KernelCall, heads: slice) -> None:
        """Merge the softmax over more keys into these rows and heads."""
        if self._out is None and call.first_write_q and _is_whole(out, call.rows, self._shape, self._dtype):
            self._out, self._lse = out, lse
            return
        (out_THE, lse_HT), rows = self.result(), call.rows
        if heads is not EVERY:
            out_THE, lse_HT = out_THE[:, heads], lse_HT[heads]
        if call.first_write_q:
            _put(out_THE, rows, out)
            _put(lse_HT.t(), rows, lse.t())
            return
        old_out, old_lse = (out_THE, lse_HT) if rows is EVERY else (out_THE[rows], lse_HT[:, rows])
        # The new keys' share of the total weight. exp(-inf - x) = 0 makes the first tile of a row a plain copy.
        weight_THE = torch.sigmoid(lse - old_lse).t().unsqueeze(2)
        if not isinstance(rows, slice):
            lse_HT[:, rows] = torch.logaddexp(old_lse, lse)
            out_THE[rows] = torch.lerp(old_out.to(self._acc), out.to(self._acc), weight_THE).to(self._dtype)
            return
        torch.logaddexp(old_lse, lse, out=old_lse)
        if self._dtype == self._acc:
            old_out.lerp_(out.to(self._acc), weight_THE)
        else:
            old_out.copy_(torch.lerp(old_out.to(self._acc), out.to(self._acc), weight_THE))

    def result(self) -> tuple[Tensor, Tensor]:
        """out_THE, in the dtype it is kept in, and lse_HT; rows that no tile has reached are 0 and -inf."""
        if self._out is None or self._lse is None:
            rows_to_zero = self._work.rows.rows_to_zero
            self._out = self._like.new_empty(self._shape, dtype=self._dtype)
            self._lse = self._like.new_empty(self._shape[1::-1], dtype=self._acc)
            _fill_(self._out, rows_to_zero, 0.0)
            _fill_(self._lse.t(), rows_to_zero, float("-inf"))
        return self._out, self._lse


class GradientSum:
    """A gradient summed over tiles, shaped as `like`.

    into: where the result is to lie, in its dtype; None: in a tensor of its own, in the dtype that it is summed in.
    """

    def __init__(self, like: Tensor, parts: WriteCounts, into: Tensor | None = None) -> None:
        self.like, self._parts, self._into = like, parts, into
        self._dtype = accumulation_dtype(like.dtype) if parts.max_parts > 2 else like.dtype
        self._total: Tensor | None = None

    def add(self, part: Tensor, rows: Index, heads: slice, *, is_first_write: bool, unique_keys: bool = True) -> None:
        """Add `part` to these rows and heads. is_first_write: nothing has been added to them before."""
        total = self._total
        if total is None:
            if is_first_write and self._into is None and _is_whole(part, rows, self.like.shape, self._dtype):
                self._total = part
                return
            total = self._started()
        if heads is not EVERY:
            total = total[:, heads]
        if is_first_write:
            _put(total, rows, part)
        elif isinstance(rows, slice):
            (total if rows is EVERY else total[rows]).add_(part)
        elif unique_keys:
            total[rows] = total[rows].add_(part)
        else:
            total.index_add_(0, rows, part.to(total.dtype))

    def result(self) -> Tensor:
        total = self._started()
        if self._into is not None and total is not self._into:
            self._into.copy_(total)
        return total

    def _started(self) -> Tensor:
        if self._total is None:
            if self._into is not None and self._into.dtype == self._dtype:
                self._total = self._into
            else:
                self._total = self.like.new_empty(self.like.shape, dtype=self._dtype)
            _fill_(self._total, self._parts.rows_to_zero, 0.0)
        return self._total


def _is_whole(part: Tensor, rows: Index, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a part is a result by itself: all rows in order and all heads, in memory of its own."""
    return part.shape == shape and part.dtype == dtype and isinstance(rows, slice) and part.is_contiguous()


def _put(target: Tensor, rows: Index, value: Tensor) -> None:
    """target[rows] = value, in the target's dtype (torch does not convert what it scatters)."""
    if isinstance(rows, slice):
        (target if rows is EVERY else target[rows]).copy_(value)
    else:
        target[rows] = value.to(target.dtype)


def _fill_(x: Tensor, rows: Index, value: float) -> None:
    """x[rows] = value, without a scalar that has to be copied to the device."""
    if rows is NONE:
        return
    if isinstance(rows, slice):
        x[rows].fill_(value)
    else:
        x.index_fill_(0, rows, value)
