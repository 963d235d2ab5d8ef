"""Schedules of recurrent layers on a device, made once per batch: index tensors for `scan` and `state_passing`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..batch.layout import SequenceLayout
from ..utils.upload import upload
from .schedule import StateSchedule, make_halo_schedule, make_scan_schedule, make_state_schedule


@dataclass(frozen=True, eq=False)
class HaloWork:
    """A `HaloSchedule` on a device.

    Attributes:
        send: send[q]: own tokens that rank q reads.
        receive: receive[p]: number of tokens that arrive from rank p.
        extended: index into [own tokens, received tokens, one row of zeros].
        results: index in `extended` of each own token.
    """

    send: list[Tensor]
    receive: list[int]
    extended: Tensor
    results: Tensor


@dataclass(frozen=True, eq=False)
class StateDeviceSchedule:
    """A `StateSchedule` on a device.

    Attributes:
        rows: own tokens of each run, one tensor [n, m] per group of runs.
        inside: which entries of `rows` are tokens of the run, not repetition [n, m].
        back: for own tokens, their index in the flattened rows.
        gives: gives[p]: number of giving runs of rank p.
        giving: for each tensor of rows, the rows that give a state.
        back_in_order: permutation of these, concatenated, into sequence order.
        takes: takes[p]: numbers of the giving runs whose state rank p needs.
        taking: index into takes[rank] of each own row; -1: it starts from zero.
        order: permutation from rank order to sequence order of the giving runs.
        chained: chained[i]: whether giving run i continues from run i - 1; on the host.
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


def scan_device_schedule(layout: SequenceLayout, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Index tensors of a `ScanSchedule`: rows, and the way back."""

    def make() -> tuple[list[Tensor], Tensor]:
        plan = make_scan_schedule(layout.documents, layout.positions_per_rank(), layout.length, layout.padded)
        *rows, back = upload([*plan.rows, plan.back], device)
        return rows, back

    return layout.memoize(("scan", device), make)


def halo_device_schedule(layout: SequenceLayout, reach: int, device: torch.device) -> HaloWork:
    """The halo of a convolution over `reach` earlier tokens."""

    def make() -> HaloWork:
        plan = make_halo_schedule(layout.documents, layout.positions_per_rank(), layout.mesh.rank, reach)
        *send, extended, results = upload([*plan.send, plan.extended, plan.results], device)
        return HaloWork(send, plan.receive, extended, results)

    return layout.memoize(("halo", reach, device), make)


def state_schedule(layout: SequenceLayout) -> StateSchedule:
    """Runs of tokens, and the states that pass between them."""

    def make() -> StateSchedule:
        return make_state_schedule(
            layout.documents, layout.positions_per_rank(), layout.mesh.rank, layout.length, layout.padded
        )

    return layout.memoize("state_schedule", make)


def state_device_schedule(layout: SequenceLayout, device: torch.device) -> StateDeviceSchedule:
    """The schedule of a scan that passes states."""

    def make() -> StateDeviceSchedule:
        plan = state_schedule(layout)
        inside = [np.arange(rows.shape[1]) < sizes[:, None] for rows, sizes in zip(plan.rows, plan.sizes, strict=True)]
        edges = np.cumsum([0, *map(len, plan.rows)])
        places = [np.flatnonzero((plan.giving >= a) & (plan.giving < b)) for a, b in pairwise(edges)]
        wanted = [plan.giving[place] - a for place, a in zip(places, edges[:-1], strict=True)]
        in_order = np.argsort(np.concatenate(places))
        *lists, back, back_in_order, taking, order = upload(
            [*plan.rows, *inside, *wanted, *plan.takes, plan.back, in_order, plan.taking, plan.order], device
        )
        kinds = len(plan.rows)
        rows, marks, giving, takes = (
            lists[:kinds],
            lists[kinds : 2 * kinds],
            lists[2 * kinds : 3 * kinds],
            lists[3 * kinds :],
        )
        return StateDeviceSchedule(
            rows, marks, back, plan.gives, giving, back_in_order, takes, taking, order, plan.chained.tolist()
        )

    return layout.memoize(("states", device), make)
