"""States that recurrent layers keep of a sharded prompt: whole ones, which are small, on every rank.

Shape suffixes: B rows, L tokens of a row on this rank, H heads, h those of one rank, C channels, K inputs that a
convolution keeps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch.layout import SequenceLayout
from ..distributed.comm import all_gather, all_reduce_sum
from .scan import split_scan_heads


def gather_states(
    states: Sequence[Tensor], heads: int, groups: int, size: Sequence[int], like: Tensor, layout: SequenceLayout
) -> Tensor:
    """The states after the last token of each row [B, H, *size] in fp32, from those of every rank's heads.

    Args:
        states: what the kernel returned on this rank [B, h, *size]; empty where it has no head. Rows of a batch that
            generates are documents of one length, which the kernel computes together.
        heads: H.
        groups: groups of heads that share an input.
        size: of the state of one head.
        like: a tensor on the device.
        layout: of the prompts.
    """
    assert layout.mesh.group is not None and len(states) <= 1
    shares = split_scan_heads(heads, groups, layout.mesh.size)
    most = max(last - first for first, last, *_ in shares)
    mine = like.new_zeros(layout.batch, most, *size, dtype=torch.float32)
    for state in states:
        mine[:, : state.shape[1]] = state
    parts = all_gather(mine, layout.mesh.group)
    return torch.cat([part[:, : last - first] for part, (first, last, *_) in zip(parts, shares, strict=True)], dim=1)


def gather_last_inputs(x_BCL: Tensor, count: int, layout: SequenceLayout) -> Tensor:
    """The last inputs of each row [B, C, K = count], zeros before a shorter row, from every rank's tokens."""
    assert layout.mesh.group is not None
    tail_BCK = x_BCL.new_zeros(*x_BCL.shape[:2], count)
    places = torch.from_numpy(layout.row_positions() - (layout.length - count)).to(x_BCL.device)
    here = (places >= 0) & (places < count)
    tail_BCK[:, :, places[here]] = x_BCL[:, :, here]
    return all_reduce_sum(tail_BCK, layout.mesh.group)  # zeros elsewhere: exact
