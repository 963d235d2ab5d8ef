"""Ranks that generate together draw the same numbers, choose the same tokens and stop at the same one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from ...batch.fingerprint import checksum, words
from ...distributed.agreement import named
from ...distributed.comm import all_gather, broadcast_object
from ...distributed.failures import on_every_rank
from ...distributed.mesh import UspMesh
from ...errors import UspRankError


def random_state(device: torch.device) -> Tensor:
    """The state of the generator from which tokens are drawn on a device."""
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def set_random_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def same_draws(mesh: UspMesh, device: torch.device) -> None:
    """All ranks of a mesh go on with the random state of the first one."""
    if mesh.group is not None:
        state = broadcast_object(random_state(device).numpy(), mesh.ranks[0], mesh.group)
        set_random_state(torch.from_numpy(state.copy()), device)


class SameTokens(StoppingCriteria):
    """Compares the new tokens of all ranks after every step, with one message of a few numbers.

    criteria: the caller's, which may look at a clock or a random number; the first rank's answers count.
    """

    def __init__(self, mesh: UspMesh, criteria: Any) -> None:
        self.mesh, self.criteria, self.length = mesh, StoppingCriteriaList(criteria or ()), 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        stops = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if len(self.criteria):
            stops = self.criteria(input_ids, scores, **kwargs)
        if self.mesh.group is None:
            return stops
        new = input_ids[:, self.length if 0 < self.length < input_ids.shape[1] else -1 :]
        self.length = input_ids.shape[1]
        mine = torch.stack([checksum(words(new)), torch.tensor(self.length, device=new.device)])
        said = all_gather(torch.cat([mine, stops.long()]), self.mesh.group)
        differing = (said[:, :2] != said[0, :2]).any(1)
        if bool(differing.any()):
            ranks = [self.mesh.ranks[i] for i in differing.nonzero().flatten().tolist()]
            raise on_every_rank(
                UspRankError(
                    f"{named(ranks)} chose other tokens than rank {self.mesh.ranks[0]} at token {self.length}",
                    rule="all ranks choose the same tokens from the same logits",
                    remedy="let logits processors of your own depend on tokens and scores alone; run all ranks on the "
                    "same hardware",
                )
            )
        return said[0, 2:].bool()
