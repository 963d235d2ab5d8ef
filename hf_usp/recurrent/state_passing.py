"""The delta rule by state passing: every rank scans its own tokens and sends only states.

The state that a run of tokens leaves behind is an affine map of the state it begins with: S -> M S + B. Each rank runs
the model's own kernel over its runs, from the zero state with the real values and from the identity with zeros side by
side, and so finds B and M. The maps go to where their head is looked after, are put one after the other there, and
every run gets the state that it begins with; then the kernel runs once more, from that state. Nothing travels for
documents that lie within one rank, and the number of heads does not matter.

Shape suffixes: N runs as rows of M tokens, H heads, h those looked after here, K key width, E value width, R runs that
give their state on, of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..batch.layout import SequenceLayout
from .device_schedule import StateDeviceSchedule, state_device_schedule
from .scan import exchange

# (tensors [N, M, ...], initial state [N, H, K, E] or None, whether the final state is wanted) -> out, final state
StateKernel = Callable[[Mapping[str, Tensor], Tensor | None, bool], tuple[Tensor, Tensor | None]]


def scan_by_states(kernel: StateKernel, layout: SequenceLayout, tensors: Mapping[str, Tensor]) -> Tensor:
    """Run a delta rule over a sharded sequence; documents start from zero. Differentiable.

    Args:
        kernel: the model's own; the state after a token is linear in the state before it and in "value", and stays as
            it is where "g" (the log of the decay) and "beta" are zero.
        layout: of this batch.
        tensors: "query" and "key" [B, L, G, K], "value" [B, L, H, E], "g" [B, L, H] or [B, L, H, K], "beta" [B, L, H].

    Returns:
        [B, L, H, E], of this rank's tokens.
    """
    batch, length = tensors["value"].shape[:2]
    plan = state_device_schedule(layout, tensors["value"].device)
    rows = []
    for index_NM, inside_NM in zip(plan.rows, plan.inside, strict=True):
        taken = {name: x.flatten(0, 1)[index_NM] for name, x in tensors.items()}
        for gate in ("g", "beta"):  # what stands behind a run's last token leaves the state alone
            taken[gate] = taken[gate] * inside_NM.view(*inside_NM.shape, *[1] * (taken[gate].ndim - 2))
        rows.append(taken)
    states_NHKE = _first_states(kernel, layout, rows) if sum(plan.gives) else None
    results, done = [], 0
    for taken in rows:
        count = len(taken["value"])
        first = None if states_NHKE is None else states_NHKE[done : done + count]
        results.append(kernel(taken, first, False)[0].flatten(0, 1))
        done += count
    return torch.cat(results)[plan.back].unflatten(0, (batch, length))


def _first_states(kernel: StateKernel, layout: SequenceLayout, rows: list[dict[str, Tensor]]) -> Tensor:
    """The state that each of this rank's runs begins with [N, H, K, E], in fp32."""
    mesh, plan = layout.mesh, state_device_schedule(layout, rows[0]["value"].device)
    heads, value = rows[0]["value"].shape[2:]
    key = rows[0]["key"].shape[3]
    maps_RHKX = _maps(kernel, rows, plan)
    edges = [heads * rank // mesh.size for rank in range(mesh.size + 1)]
    shares = list(zip(edges[:-1], edges[1:], strict=True))
    mine = edges[mesh.rank + 1] - edges[mesh.rank]
    # A slice of nothing keeps ranks that give nothing in the graph: they take part in the backward too.
    anchor = torch.cat([x.flatten()[:0].float() for taken in rows for x in taken.values()])
    sent = [maps_RHKX[:, a:b].reshape(-1) for a, b in shares]
    size = mine * key * (key + value)
    (arrived,) = exchange(
        mesh.group, [[x.numel() for x in sent]], [[count * size for count in plan.gives]], torch.cat([*sent, anchor])
    )
    maps_RhKX = arrived.view(sum(plan.gives), mine, key, key + value)[plan.order]
    after, state = [], maps_RhKX.new_zeros(mine, key, value)
    for map_hKX, chained in zip(maps_RhKX, plan.chained, strict=True):
        added, transition = map_hKX.split([value, key], dim=2)
        state = added + transition @ state if chained else added
        after.append(state)
    after_RhKE = torch.stack(after)
    sent = [after_RhKE[index].reshape(-1) for index in plan.takes]
    own = len(plan.takes[mesh.rank])
    received = [own * (b - a) * key * value for a, b in shares]
    (arrived,) = exchange(mesh.group, [[x.numel() for x in sent]], [received], torch.cat(sent))
    blocks = [x.view(own, b - a, key, value) for x, (a, b) in zip(arrived.split(received), shares, strict=True)]
    begins_NHKE = torch.cat(blocks, dim=1)
    return torch.cat([begins_NHKE, begins_NHKE.new_zeros(1, heads, key, value)])[plan.taking]


def _maps(kernel: StateKernel, rows: list[dict[str, Tensor]], plan: StateDeviceSchedule) -> Tensor:
    """Update and transition of the state by each giving run, concatenated [R, H, K, E + K], in fp32."""
    found, heads = [], rows[0]["value"].shape[2]
    key, value = rows[0]["key"].shape[3], rows[0]["value"].shape[3]
    for taken, wanted in zip(rows, plan.giving, strict=True):
        if len(wanted):
            some = {name: x[wanted] for name, x in taken.items()}
            some["value"] = torch.nn.functional.pad(some["value"], (0, key))
            zero = some["value"].new_zeros(len(wanted), heads, key, value, dtype=torch.float32)
            identity = torch.eye(key, device=zero.device).expand(*zero.shape[:3], key)
            state = kernel(some, torch.cat([zero, identity], dim=3), True)[1]
            assert state is not None
            found.append(state.float())
    if not found:
        return rows[0]["value"].new_zeros(0, heads, key, key + value, dtype=torch.float32)
    return torch.cat(found)[plan.back_in_order]
