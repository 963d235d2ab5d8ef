"""The plans of recurrent layers on a device, made once per batch: index tensors for `scan` and `states`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..batch import Layout
from ..integers.scan_plan import StatePlan, plan_halo, plan_scan, plan_states


@dataclass(frozen=True, eq=False)
class HaloWork:
    """A `HaloPlan` on a device."""

    send: list[Tensor]
    receive: list[int]
    extended: Tensor
    results: Tensor


@dataclass(frozen=True, eq=False)
class StateWork:
    """A `StatePlan` on a device; `chained` is read on the host.

    inside [n, m]: the tokens of a run. giving: of each tensor of rows, those that give their state on; back_in_order:
    puts these, one group after the other, into the plan's order.
    """

    rows: list[Tensor]
    inside: list[Tensor]
    back: Tensor
    gives: list[int]
    giving: list[Tensor]
    back_in_order: Tensor
    takes: list[Tensor]
    taking: Tensor
    order: Tensor
    chained: list[bool]


def scan_work(layout: Layout, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Index tensors of a `ScanPlan`: rows, and the way back."""

    def make() -> tuple[list[Tensor], Tensor]:
        plan = plan_scan(layout.documents, layout.held(), layout.length, layout.padded)
        rows = [torch.from_numpy(index).to(device) for index in plan.rows]
        return rows, torch.from_numpy(plan.back).to(device)

    return layout.once(("scan", device), make)


def halo_work(layout: Layout, reach: int, device: torch.device) -> HaloWork:
    """What a convolution over `reach` earlier tokens fetches."""

    def make() -> HaloWork:
        plan = plan_halo(layout.documents, layout.held(), layout.mesh.rank, reach)
        *send, extended, results = (
            torch.from_numpy(index).to(device) for index in (*plan.send, plan.extended, plan.results)
        )
        return HaloWork(send, plan.receive, extended, results)

    return layout.once(("halo", reach, device), make)


def state_plan(layout: Layout) -> StatePlan:
    """Runs of tokens, and the states that pass between them."""

    def make() -> StatePlan:
        return plan_states(layout.documents, layout.held(), layout.mesh.rank, layout.length, layout.padded)

    return layout.once("state_plan", make)


def state_work(layout: Layout, device: torch.device) -> StateWork:
    """What a scan that passes states needs."""

    def make() -> StateWork:
        plan = state_plan(layout)
        inside = [np.arange(rows.shape[1]) < sizes[:, None] for rows, sizes in zip(plan.rows, plan.sizes, strict=True)]
        edges = np.cumsum([0, *map(len, plan.rows)])
        places = [np.flatnonzero((plan.giving >= a) & (plan.giving < b)) for a, b in pairwise(edges)]
        wanted = [plan.giving[place] - a for place, a in zip(places, edges[:-1], strict=True)]
        rows, marks, giving, takes = (
            [torch.from_numpy(index).to(device) for index in indices]
            for indices in (plan.rows, inside, wanted, plan.takes)
        )
        in_order = np.argsort(np.concatenate(places))
        back, back_in_order, taking, order = (
            torch.from_numpy(index).to(device) for index in (plan.back, in_order, plan.taking, plan.order)
        )
        return StateWork(
            rows, marks, back, plan.gives, giving, back_in_order, takes, taking, order, plan.chained.tolist()
        )

    return layout.once(("states", device), make)
