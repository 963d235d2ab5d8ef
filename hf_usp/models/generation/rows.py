"""Each rank generates for its rows of the batch; every rank gets the tokens of all rows.

Sampled tokens are those of one process: every rank draws the numbers of all rows and uses those of its own.

Shape suffixes: B rows of all ranks, b rows of this one, S tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.generation import LogitsProcessor, LogitsProcessorList

from ...compat import sampling_loop
from ...distributed.comm import all_gather, broadcast_object
from ...distributed.mesh import UspMesh
from ...errors import UspError, UspModelError
from ..consistency import is_part
from ..unsharded import CACHES
from .agreement import random_state, same_draws, set_random_state
from .settings import PROMPTS, Given, pad_token, prompt_of, setting


def refuse_rows(model: PreTrainedModel, given: Given) -> UspError | None:
    """Why rows of this call cannot be generated apart; None where they can."""
    beams = setting(model, given, "num_beams") or 1
    other = [name for name, value in given.items() if isinstance(value, Tensor) and name not in PROMPTS]
    reason = None
    if any(is_part(parameter) for parameter in model.parameters()):
        reason = "weights of which each rank has a part (FSDP2, ZeRO-3): rows end at different tokens"
    elif setting(model, given, "return_dict_in_generate"):
        reason = "return_dict_in_generate=True"
    elif beams > 1 and setting(model, given, "do_sample"):
        reason = "beams that are sampled"
    elif other:
        reason = f"the tensor {other[0]}"
    else:
        names = (*CACHES, "assistant_model", "custom_generate", "streamer", "stopping_criteria", "logits_processor")
        reason = next((name for name in (*names, "prefix_allowed_tokens_fn") if given.get(name) is not None), None)
    if reason is None:
        return None
    return UspModelError(
        f"generate='rows' with {reason}",
        rule="each rank generates for its rows alone, and all get the tokens of all rows",
        remedy="use generate='whole', or leave that out",
    )


def generate_rows(whole: Callable[..., Any], model: PreTrainedModel, mesh: UspMesh, given: Given) -> Tensor:
    """The tokens of all rows, on every rank.

    whole: `generate` of this rank alone.
    """
    assert mesh.group is not None
    prompt, copies = prompt_of(given), setting(model, given, "num_return_sequences") or 1
    rows, device = len(prompt), model.device
    mine = np.array_split(np.arange(rows), mesh.size)[mesh.rank]
    first, last = (int(mine[0]), int(mine[-1]) + 1) if len(mine) else (0, 0)
    own = dict(given) | {name: given[name][first:last] for name in PROMPTS if _has_rows(given.get(name), rows)}
    draws = None
    if setting(model, given, "do_sample"):
        same_draws(mesh, device)
        draws = _Draws(rows * copies, first * copies, device)
        own["custom_generate"] = draws.generate
    tokens_bS = torch.zeros(0, 0, dtype=torch.int64, device=device)
    if first < last:
        tokens_bS = whole(**own)
    if draws is not None:
        draws.same_afterwards(mesh)
    shapes = all_gather(torch.tensor(tokens_bS.shape, device=device), mesh.group).tolist()
    most, longest = (max(sizes) for sizes in zip(*shapes, strict=True))
    padding = (0, longest - tokens_bS.shape[1], 0, most - len(tokens_bS))
    gathered = all_gather(pad(tokens_bS, padding, value=pad_token(model, given)), mesh.group)
    return torch.cat([part[:count] for part, (count, _) in zip(gathered, shapes, strict=True)])


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and len(value) == rows


class _Draws(LogitsProcessor):
    """The last logits processor of a rank: it draws the tokens of its rows as one process does, from all rows' numbers.

    One token a row is argmax(p / q) with q exponentially distributed: `torch.multinomial` of one sample, which then
    finds a single token left. steps: numbers that were drawn, for all rows each.
    """

    def __init__(self, rows: int, first: int, device: torch.device) -> None:
        self.rows, self.first, self.steps = rows, first, 0
        self.generator = torch.Generator(device)
        self.generator.set_state(random_state(device))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        p_bV = scores.softmax(dim=-1)
        shape = (self.rows, p_bV.shape[1])
        q_BV = torch.empty(shape, dtype=p_bV.dtype, device=p_bV.device).exponential_(1, generator=self.generator)
        chosen = (p_bV / q_BV[self.first : self.first + len(p_bV)]).argmax(dim=-1, keepdim=True)
        self.steps += 1
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen, 0.0)

    def generate(
        self, model: PreTrainedModel, input_ids: Tensor, logits_processor: LogitsProcessorList, **kwargs: Any
    ) -> Tensor:
        """The decoding loop of Transformers, with this processor behind all others (`custom_generate`)."""
        return sampling_loop(model)(
            input_ids, logits_processor=LogitsProcessorList([*logits_processor, self]), **kwargs
        )

    def same_afterwards(self, mesh: UspMesh) -> None:
        """All ranks go on with the random state of one process, whose rows end with the last one."""
        assert mesh.group is not None
        steps = all_gather(torch.tensor([self.steps], device=self.generator.device), mesh.group).flatten()
        longest = mesh.ranks[int(steps.argmax())]
        state = broadcast_object(self.generator.get_state().numpy(), longest, mesh.group)
        set_random_state(torch.from_numpy(state.copy()), self.generator.device)
