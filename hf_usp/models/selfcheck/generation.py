"""The self-check of sharded generation: a short prompt and three tokens, sharded and in one process.

It finds models whose layers keep caches of their own, share keys, or count positions in a way that a sharded cache does
not show. Prompts are padded on the left; the tokens are given, so logits can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...batch.context import ForwardContext
from ...batch.sharded_tensors import context_of
from ...distributed.comm import verify_same_across_ranks
from ...distributed.mesh import UspMesh
from ...errors import UspError, UspModelError
from ..generation.cache import UspCache
from ..generation.entry import cache_name
from .check import isolated_forward, random_batch
from .compare import tolerance_of

STEPS = 3
# Keywords of a forward with a cache -> those for this rank; then what the model returns for them -> its outputs.
Before = Callable[[PreTrainedModel, dict[str, Any], UspCache], dict[str, Any]]
After = Callable[[PreTrainedModel, tuple, dict[str, Any], Any], Any]


def check_generation(model: PreTrainedModel, mesh: UspMesh, device: torch.device, before: Before, after: After) -> None:
    """Raise `UspModelError` on every rank of the mesh if sharded generation has other logits than one process."""
    ids = random_batch(model, mesh, device)["input_ids"]
    ids = torch.cat([ids.flip(1), ids])
    mask = torch.ones(len(ids), ids.shape[1] + STEPS, dtype=torch.int64, device=device)
    mask[0, :2] = 0
    found: list[ForwardContext] = []
    cache = UspCache(model, mesh)

    def sharded(keywords: dict[str, Any]) -> Any:
        share = before(model, {**keywords, name: cache}, cache)
        found.extend(filter(None, [context_of(*share.values())]))
        return after(model, (), share, model.forward(**share))

    name, error = cache_name(), None
    with isolated_forward(model, device):
        try:
            theirs = _logits(lambda keywords: model.forward(**keywords), name, ids, mask)
            mine = _logits(sharded, name, ids, mask)
        except UspError:
            raise
        except Exception as problem:
            error = _refusal(model, f"{type(problem).__name__}: {problem}")
        else:
            size = theirs.double().norm(dim=-1).mean().clamp_min(1e-12)
            off = ((mine - theirs).double().norm(dim=-1) / size).max().item()
            tolerance = tolerance_of(model, found[0])
            if not off <= tolerance:
                error = _refusal(model, f"logits differ by {off:.1e} of their size, where {tolerance:.0e} is allowed")
    assert mesh.group is not None
    verify_same_across_ranks(torch.zeros(1, dtype=torch.int64, device=device), error, mesh.group, UspModelError)


def _logits(forward: Callable[[dict[str, Any]], Any], name: str, ids: Tensor, mask: Tensor) -> Tensor:
    """The last logits of the prompt, and those of each step [steps + 1, rows, vocabulary]."""
    length, cache, found = ids.shape[1], None, []
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for start, stop in ((0, length), *((length + i, length + i + 1) for i in range(STEPS))):
        tokens = ids if not start else ids[:, start - length : stop - length]
        keywords = {"input_ids": tokens, "attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        given: dict[str, Any] = {} if cache is None else {name: cache}
        output = forward(keywords | {"use_cache": True, "logits_to_keep": 1, "return_dict": True} | given)
        cache = output[name]
        found.append(output.logits[:, -1])
    return torch.stack(found)


def _refusal(model: PreTrainedModel, found: str) -> UspModelError:
    return UspModelError(
        f"{type(model).__name__} does not generate from a sharded prompt as one process does: {found}",
        rule="every layer attends to keys that it keeps in the cache, by positions that it is given",
        remedy="use generate='whole'",
    )
