"""`generate` on a prepared model: each rank alone, each rank its rows, or the prompt sharded.

`generate` of Transformers runs unchanged. Around it the ranks of a mesh compare prompts and settings, so that what one
of them refuses none begins; a criterion compares the tokens of every step, so that all ranks stop together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin, StoppingCriteriaList

from ...batch.fingerprint import fingerprint
from ...distributed.comm import all_gather, verify_same_across_ranks
from ...distributed.mesh import UspMesh
from ...errors import UspConfigError
from ..direct_calls import DirectForwardCalls
from ..pickling import NotSaved
from ..unsharded import cache_keyword
from .agreement import SameTokens, same_draws
from .cache import UspCache
from .rows import generate_rows, refuse_rows
from .settings import PROMPTS, Given, cache_bytes, free_memory, prompt_of, refuse_prompts, refuse_sharded

WAYS = ("auto", "whole", "rows", "sharded")
# A prompt from which on decoding reads keys faster than ranks exchange results (predicted, docs/generation.md).
LONG_PROMPT = 16_384


MOST_MEMORY = 0.5  # of what is free, for a cache that is not sharded


class GenerateCalls(NotSaved):
    """`generate` of one model, an attribute of the model with the signature of the class's; `remove` takes it back.

    check: compares sharded generation with that of one process, before the first one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mesh: UspMesh,
        way: str,
        entry: DirectForwardCalls,
        check: Callable[[PreTrainedModel], None],
    ) -> None:
        self.model, self.mesh, self.way, self.entry, self.check = model, mesh, way, entry, check
        self.generate: MethodType | None = None
        if not isinstance(model, GenerationMixin) or not model.can_generate():
            return
        self.before = vars(model).get("generate")
        plain = model.generate
        signature = inspect.signature(plain)

        def generate(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs).arguments
            rest = bound.pop("kwargs", {})
            original = plain.__func__.__get__(model) if isinstance(plain, MethodType) else plain
            return self.run(original, {**bound, **rest})

        owner = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        generate.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[owner, *signature.parameters.values()]
        )
        self.generate = model.generate = MethodType(generate, model)

    def remove(self) -> None:
        self.way = "whole"  # for whoever has kept it
        if self.generate is None or vars(self.model).get("generate") is not self.generate:
            return
        if self.before is None:
            del self.model.generate
        else:
            self.model.generate = self.before

    def run(self, plain: Callable[..., Any], given: Given) -> Any:
        """One call of `generate`, with the arguments that were given."""
        if self.entry.generating or self.way == "whole":
            return self._whole(plain, given)
        way = self._agree(given)
        if way == "rows":
            return generate_rows(lambda **own: self._whole(plain, own), self.model, self.mesh, given)
        return self._sharded(plain, given) if way == "sharded" else self._whole(plain, given)

    def _whole(self, plain: Callable[..., Any], given: Given) -> Any:
        before, self.entry.generating = self.entry.generating, True
        try:
            return plain(**given)
        finally:
            self.entry.generating = before

    def _agree(self, given: Given) -> str:
        """The way of this call, once all ranks hold the same prompts and settings and none refuses them."""
        mesh, device = self.mesh, self.model.device
        problem, found = None, torch.zeros(2, dtype=torch.int64)
        try:
            refuse_prompts(self.model, given)
            self._refuse(given)
            prompts = {name: given[name] for name in PROMPTS if given.get(name) is not None}
            plain = {name: value for name, value in given.items() if not isinstance(value, Tensor)}
            for name in ("generation_config", "of the model"):
                config = given.get(name) if name in given else self.model.generation_config
                plain[name] = None if config is None else config.to_dict()
            found = fingerprint({name: _on(value, device) for name, value in prompts.items()} | plain)
        except Exception as error:  # every rank must hear of it, whatever it is
            problem = error
        if mesh.group is not None:
            verify_same_across_ranks(found.to(device), problem, mesh.group, begins=True)
        elif problem is not None:
            raise problem
        return self._chosen(given) if self.way == "auto" else self.way

    def _refuse(self, given: Given) -> None:
        """Raise where the way that was asked for cannot be taken."""
        problem = None
        if self.way == "rows":
            problem = refuse_rows(self.model, given)
        elif self.way == "sharded":
            problem = refuse_sharded(self.model, self.mesh, given)
        if problem is not None:
            raise problem

    def _chosen(self, given: Given) -> str:
        """The way for these prompts, the same on all ranks of the mesh: their memory may differ."""
        prompt = prompt_of(given)
        by_rows = len(prompt) > 1 and refuse_rows(self.model, given) is None
        if refuse_sharded(self.model, self.mesh, given) is None:
            free, need = free_memory(self.model.device), cache_bytes(self.model, given)
            if free is not None and self.mesh.group is not None:
                free = int(all_gather(torch.tensor([free], device=self.model.device), self.mesh.group).min())
            share = need // self.mesh.size if by_rows else need
            if prompt.shape[1] >= LONG_PROMPT or (free is not None and share > MOST_MEMORY * free):
                return "sharded"
        return "rows" if by_rows else "whole"

    def _sharded(self, plain: Callable[..., Any], given: Given) -> Any:
        self.check(self.model)
        given = dict(given)
        same_draws(self.mesh, self.model.device)
        earlier = [given.pop(name) for name in CACHE_NAMES if given.get(name) is not None]
        given[cache_name()] = earlier[0] if earlier else UspCache(self.model, self.mesh)
        given["stopping_criteria"] = StoppingCriteriaList([SameTokens(self.mesh, given.get("stopping_criteria"))])
        return plain(**given | {"use_cache": True})


CACHE_NAMES = ("cache", "past_key_values")


def cache_name() -> str:
    """The keyword with which models take a cache; Transformers 5.24 renamed it."""
    return cache_keyword(GenerationMixin.prepare_inputs_for_generation)  # models' own may leave it to **kwargs


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def check_way(generate: str) -> None:
    """Raise `UspConfigError` for a way to generate that does not exist."""
    if not isinstance(generate, str) or generate not in WAYS:
        raise UspConfigError(
            f"generate={generate!r:.100}",
            rule=f"generate is one of {', '.join(WAYS)}",
            remedy="leave it out: each rank generates alone, as without hf_usp",
        )
