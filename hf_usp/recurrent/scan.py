"""Layers with a state along the sequence: short causal convolutions and linear recurrences, on a sharded sequence.

A recurrence works on each head by itself. So the heads of all tokens are exchanged: every rank of the mesh runs the
model's own kernel on whole documents for its share of the heads, and gives the results back (what DeepSpeed-Ulysses,
arXiv 2309.14509, does for attention). That holds for any order of tokens, any kernel, and resets at documents by
construction. A convolution only needs the few tokens before each run of tokens; they are fetched from their owners.

Shape suffixes: B rows, L local tokens of a row, T = P * B * L tokens of all ranks, H heads, G groups of heads that
share an input, h, g those of this rank, N rows of M tokens (documents), C channels, E width of a result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention.custom_op import needs_custom_op
from ..batch.layout import SequenceLayout
from ..distributed.comm import Group, all_to_all, all_to_all_custom_op
from ..utils.autograd import forbid_double_backward
from .device_schedule import halo_device_schedule, scan_device_schedule

# First and past-the-last head, and the same for groups.
Share = tuple[int, int, int, int]
# (tensors per head [N, M, h, ...], tensors per group [N, M, g, ...], parameters [h, ...]) -> result [N, M, h, E]
Kernel = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]


def scan_over_heads(
    kernel: Kernel,
    layout: SequenceLayout,
    heads: Mapping[str, Tensor],
    groups: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    width: int,
) -> Tensor:
    """Run a causal `kernel` over whole documents, each rank on its share of the heads. Differentiable.

    Args:
        kernel: maps rows of whole documents to a result; position t may depend on positions up to t, heads on
            themselves only.
        layout: of this batch.
        heads: inputs with an entry per head [B, L, H, ...].
        groups: inputs that H / G consecutive heads share [B, L, G, ...].
        parameters: tensors with an entry per head [H, ...]; each rank passes its share, so that its gradient counts
            once.
        width: E, the width of a result.

    Returns:
        [B, L, H, E], of this rank's tokens. With fewer heads than ranks some ranks only exchange.
    """
    first = next(iter(heads.values()))
    num_heads = first.shape[2]
    num_groups = next(iter(groups.values())).shape[2] if groups else num_heads
    shares = split_scan_heads(num_heads, num_groups, layout.mesh.size)
    inputs = {**{n: (x, 0) for n, x in heads.items()}, **{n: (x, 1) for n, x in groups.items()}}
    h0, h1, g0, g1 = shares[layout.mesh.rank]
    whole = _to_heads(inputs, shares, layout)
    my_parameters = {name: x[h0:h1] for name, x in parameters.items()}
    rows, back = scan_device_schedule(layout, first.device)
    results = []
    for index_NM in rows:
        tensors = {name: x[index_NM] for name, x in whole.items()}
        if h0 == h1:
            # Nothing to compute; the exchange still has to be part of the graph, or its backward would never run here.
            unused = torch.stack([x.sum().float() for x in (*tensors.values(), *my_parameters.values())]).sum()
            results.append(first.new_zeros(index_NM.numel(), 0) + unused.to(first.dtype))
            continue
        in_groups = {name: _match_groups(tensors[name], (h0, h1, g0, g1), num_heads // num_groups) for name in groups}
        result_NMhE = kernel({name: tensors[name] for name in heads}, in_groups, my_parameters)
        results.append(result_NMhE.reshape(-1, (h1 - h0) * width).to(first.dtype))
    return _to_tokens(torch.cat(results), back, shares, width, layout, first.shape[:2])


def split_scan_heads(heads: int, groups: int, ranks: int) -> list[Share]:
    """For every rank its heads [h0, h1) and the groups [g0, g1) that they read; whole groups where there are enough."""
    unit = heads // groups if groups >= ranks else 1
    count = heads // unit
    edges = [unit * (count * rank // ranks) for rank in range(ranks + 1)]
    per_group = heads // groups
    return [
        (a, b, a // per_group, -(-b // per_group) if b > a else a // per_group)
        for a, b in zip(edges, edges[1:], strict=False)
    ]


def _match_groups(x_NMg: Tensor, share: Share, per_group: int) -> Tensor:
    """Inputs of the groups of a share, so that as many consecutive heads share each."""
    h0, h1, g0, g1 = share
    if g1 - g0 == 1 or (h0 == g0 * per_group and h1 == g1 * per_group):
        return x_NMg
    return x_NMg[:, :, torch.arange(h0, h1, device=x_NMg.device) // per_group - g0]


def _to_heads(
    inputs: Mapping[str, tuple[Tensor, int]], shares: Sequence[Share], layout: SequenceLayout
) -> dict[str, Tensor]:
    """Every input over the tokens of all ranks [T, h or g, ...], for this rank's heads and groups."""
    names: dict[torch.dtype, list[str]] = {}
    for name, (x, _) in inputs.items():
        names.setdefault(x.dtype, []).append(name)

    def columns(name: str, share: Share) -> Tensor:
        x, kind = inputs[name]
        return x[:, :, share[2 * kind] : share[2 * kind + 1]].flatten(2).flatten(0, 1)

    sends, send_sizes, receive_sizes, mine = [], [], [], shares[layout.mesh.rank]
    for together in names.values():
        blocks = [torch.cat([columns(name, share) for name in together], dim=1) for share in shares]
        sends.append(torch.cat([block.reshape(-1) for block in blocks]))
        send_sizes.append([block.numel() for block in blocks])
        receive_sizes.append([blocks[layout.mesh.rank].numel()] * len(shares))
    received = exchange(layout.mesh.group, send_sizes, receive_sizes, *sends)
    tokens = len(shares) * layout.batch * layout.local_length
    whole = {}
    for flat, together in zip(received, names.values(), strict=True):
        shapes = [(mine[2 * inputs[n][1] + 1] - mine[2 * inputs[n][1]], *inputs[n][0].shape[3:]) for n in together]
        widths = [torch.Size(shape).numel() for shape in shapes]
        parts = flat.view(tokens, sum(widths)).split(widths, dim=1)
        whole.update({n: part.reshape(tokens, *shape) for n, part, shape in zip(together, parts, shapes, strict=True)})
    return whole


def _to_tokens(
    results: Tensor,
    back: Tensor,
    shares: Sequence[Share],
    width: int,
    layout: SequenceLayout,
    shape: Sequence[int],
) -> Tensor:
    """Results of this rank's heads at all tokens [rows, h * E] -> of all heads at this rank's tokens [B, L, H, E]."""
    tokens = layout.batch * layout.local_length
    flat = results[back].reshape(-1)
    receive_sizes = [tokens * (share[1] - share[0]) * width for share in shares]
    (received,) = exchange(layout.mesh.group, [[flat.numel() // len(shares)] * len(shares)], [receive_sizes], flat)
    blocks = [b.view(*shape, -1, width) for b in received.split(receive_sizes) if b.numel()]
    return torch.cat(blocks, dim=2)


def exchange(
    group: Group | None, send_sizes: list[list[int]], receive_sizes: list[list[int]], *flats: Tensor
) -> tuple[Tensor, ...]:
    """One all-to-all per flat tensor, slice i of which goes to rank i of the group. Differentiable.

    A single node of the graph, so that all ranks run the backwards of several in the same order. Every rank must need
    its gradient, also one that has nothing to send or to receive.
    """
    return _Exchange.apply(group, send_sizes, receive_sizes, *flats)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, group: Group | None, send_sizes: list[list[int]], receive_sizes: list[list[int]], *flats: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.sizes = group, (send_sizes, receive_sizes)
        return tuple(
            _all_to_all(flat, sent, received, group)
            for flat, sent, received in zip(flats, send_sizes, receive_sizes, strict=True)
        )

    @staticmethod
    @forbid_double_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        send_sizes, receive_sizes = ctx.sizes
        returned = tuple(
            _all_to_all(grad.contiguous(), received, sent, ctx.group)
            for grad, sent, received in zip(grads, send_sizes, receive_sizes, strict=True)
        )
        return None, None, None, *returned


def _all_to_all(flat: Tensor, sent: list[int], received: list[int], group: Group | None) -> Tensor:
    if group is None:
        return flat.clone()
    send = all_to_all_custom_op if needs_custom_op() else all_to_all
    return send(flat, sent, received, group)


def causal_conv(convolve: Callable[[Tensor], Tensor], x_BCL: Tensor, reach: int, layout: SequenceLayout) -> Tensor:
    """A causal convolution per channel over the whole sequence: this rank's tokens of the result [B, C, L].

    Args:
        convolve: the model's convolution [1, C, M] -> [1, C, M], whose position t depends on t - reach .. t.
        x_BCL: this rank's tokens.
        reach: how many earlier tokens a result depends on (kernel size - 1).
        layout: of this batch. Documents do not see each other.
    """
    plan = halo_device_schedule(layout, reach, x_BCL.device)
    x_TC = x_BCL.transpose(1, 2).reshape(-1, x_BCL.shape[1])
    channels = x_TC.shape[1]
    sent = torch.cat([x_TC[index].reshape(-1) for index in plan.send])
    (halo,) = exchange(
        layout.mesh.group,
        [[len(index) * channels for index in plan.send]],
        [[n * channels for n in plan.receive]],
        sent,
    )
    # The last row, zeros, stands where a document begins.
    available_TC = torch.cat([x_TC, halo.view(-1, channels), x_TC.new_zeros(1, channels)])
    out_CT = convolve(available_TC[plan.extended].t()[None])[0]
    return out_CT.t()[plan.results].unflatten(0, (layout.batch, -1)).transpose(1, 2)
