"""Models whose layers do something that does not survive sharding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class PeeksAtTheNeighbour(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + torch.nn.functional.pad(x, (0, 0, 1, -1)))


class MeanPools(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + x.mean(1, keepdim=True))


class CountsPositions(nn.Module):
    """A rotary embedding that ignores the position_ids it gets."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return self.rotary(x, torch.arange(x.shape[1])[None].expand_as(position_ids))


def spoil(model: Any, how: str) -> Any:
    old = model.model.layers[0].mlp.up_proj
    if how == "positions":
        model.model.rotary_emb = CountsPositions(model.model.rotary_emb)
    elif how == "overwrites":
        model.model.embed_tokens.max_norm = 0.01
    else:
        new = {"neighbour": PeeksAtTheNeighbour, "pool": MeanPools}[how](old.in_features, old.out_features, bias=False)
        new.weight = old.weight
        model.model.layers[0].mlp.up_proj = new
    return model
