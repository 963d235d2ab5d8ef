"""The second half of the self-check: the same comparison in training mode, before the first forward in that mode.

Layers may differ there by design (PhiMoE samples its experts) or by an oversight. Chance is held still (`steady`), all
else is compared as in the self-check. Numbers that are drawn for each token are left to the ranks that hold the tokens.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ...batch.context import ShardOptions
from ...distributed.comm import verify_same_across_ranks
from ...distributed.mesh import UspMesh
from ...errors import UspError, UspModelError
from ..indexed_layers import small_selections
from .check import fails_alone, isolated_forward, overwrites, random_batch, refusal, without_autocast
from .compare import compare, module_outputs
from .determinism import DeterministicSampling


def training_check(model: PreTrainedModel, mesh: UspMesh, options: ShardOptions, device: torch.device) -> None:
    """`self_check` of what the model computes in training mode, as its modules' flags have it.

    What is random there is held still. `UspModelError` where sharding changes the rest, or where something is drawn
    once for several tokens: the ranks that share them would draw differently.
    """
    batch, options = random_batch(model, mesh, device), without_autocast(options, device)
    with isolated_forward(model, device, training=True) as overwritten:
        before, seen = _python_draws(), DeterministicSampling()
        try:
            with seen, small_selections(model):
                found = compare(model, batch, mesh, options)
            error = None if found is None else refusal(model, f"in training mode, {found}")
        except UspError:
            raise
        except Exception as problem:
            raise fails_alone(model, problem) from problem
        if seen.single:
            error = _drawn_once(model, batch) or error
        if overwritten:
            error = overwrites(model, overwritten)
        if _python_draws() != before:
            error = _random_layers(model, "Python or numpy")
        verify_same_across_ranks(torch.zeros(1, dtype=torch.int64, device=device), error, mesh.group, UspModelError)


def _drawn_once(model: PreTrainedModel, batch: dict[str, Any]) -> UspModelError | None:
    """A refusal if it matters which number the model draws once; layers that are left out have no output."""
    low, high = (_sizes(model, batch, level) for level in (0.001, 0.999))
    same = low.keys() == high.keys() and all(abs(low[n] - high[n]) <= 1e-2 * abs(low[n]) for n in low)
    return None if same else _random_layers(model, "torch")


def _sizes(model: PreTrainedModel, batch: dict[str, Any], level: float) -> dict[str, float]:
    with DeterministicSampling(level):
        return {name: float(x.double().norm()) for name, x in module_outputs(model, batch)[0].items()}


def _python_draws() -> int:
    """A number that changes where Python or numpy draw."""
    return hash((random.getstate(), np.random.get_state()[1].tobytes(), np.random.get_state()[2]))  # type: ignore[index]


def _random_layers(model: PreTrainedModel, source: str) -> UspModelError:
    return UspModelError(
        f"{type(model).__name__} in training mode draws numbers once for many tokens ({source}'s random numbers)",
        rule="what is random for each token is drawn by the rank that holds it; ranks that share a row do not agree on "
        "layers that are left out (layer drop, stochastic depth)",
        remedy="set layerdrop (drop_path_rate, ...) to 0 in the model's config",
    )


def refuse_scaled_noise(model: PreTrainedModel) -> None:
    """Refuse NEFTune, whose hook sits on the input embeddings and leaves its strength there."""
    if model.training and getattr(model.get_input_embeddings(), "neftune_noise_alpha", None) is not None:
        raise UspModelError(
            "neftune_noise_alpha under UspParallelismConfig",
            rule="NEFTune divides its noise by the root of the number of tokens it sees, which are this rank's share: "
            "it would be stronger than in one process",
            remedy="leave neftune_noise_alpha out",
        )
