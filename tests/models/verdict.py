"""The verdict on one architecture: exact or refused, in four forms of batches and on three meshes.

`judge` runs on four ranks at once. The reference is the eager model in one process; each rank computes it for one of
the forms, so that all of it is computed once. All run in training mode, with what is random there held still (a costly
mode, left out where nothing is random). Where packed documents are refused because one process does not keep them apart
by position_ids, they are packed once more, with cu_seq_lens; the reference are then the documents one by one.
"""

from __future__ import annotations

import inspect
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ranks import RankError, Ranks
from .census import batch_of, documents_of, tiny_model

# Form of the batch -> (ring degree, ulysses degree). Rank i computes the reference of form i.
CASES = {"plain": (2, 2), "packed": (2, 2), "right": (4, 1), "left": (1, 4)}
TOLERANCE = 2e-4
TIMEOUT = 60.0
# In the refusal of documents that one process would not keep apart.
APART = "told apart by position_ids"

# Outcomes, the best first. In CRASH something else than a refusal was raised, by us or by Transformers.
EXACT, REFUSED, UNRUN, UNBUILT, CRASH, WRONG = "exact", "refused", "not run", "not built", "crash", "wrong"


@dataclass
class Verdict:
    """Of one architecture: the outcome in each form, its reason, and the largest relative error in any exact form.

    packed_by: what tells packed documents apart, if they are exact. drawn: names of the functions that draw numbers in
    training mode.
    """

    forms: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    error: float = 0.0
    packed_by: str = ""
    drawn: tuple[str, ...] = ()

    def add(self, form: str, outcome: str, reason: str = "") -> Verdict:
        self.forms[form] = outcome
        if reason:
            self.reasons[form] = reason
        return self

    def summary(self) -> str:
        """One outcome for all forms, or the commonest with the forms that have another."""
        outcomes = list(self.forms.values())
        main = max(dict.fromkeys(outcomes), key=outcomes.count)
        others = [f"{form} {self.forms[form]}" for form in CASES if self.forms[form] != main]
        return ", ".join([main, *others])

    def reason(self) -> str:
        """Why it is not exact: the first reason, in the order of the forms."""
        return next((self.reasons[form] for form in CASES if form in self.reasons), "")

    @classmethod
    def everywhere(cls, outcome: str, reason: str) -> Verdict:
        return cls(dict.fromkeys(CASES, outcome), dict.fromkeys(CASES, reason))


def judge(ranks: Ranks, subject: str, self_check: bool = True) -> Verdict:
    """The verdict on one of `census.subjects()`."""
    try:
        parts = ranks.run(judge_here, subject, self_check, timeout=TIMEOUT)
    except RankError as problem:
        return Verdict.everywhere(CRASH, str(problem)[-1500:])
    whole = Verdict()
    for part in parts:
        whole.forms |= part.forms
        whole.reasons |= part.reasons
        whole.error = max(whole.error, part.error)
        whole.packed_by = part.packed_by or whole.packed_by
        whole.drawn = part.drawn or whole.drawn
    if CRASH in whole.forms.values():
        ranks.stop()  # whatever the ranks had under way ends with them
    return whole


def judge_here(subject: str, self_check: bool) -> Verdict:
    """This rank's part of `judge`: the forms that it can tell about."""
    from transformers.utils import logging

    logging.set_verbosity(logging.CRITICAL)
    with warnings.catch_warnings():
        # Warnings of models that are built and run alone are not the subject.
        warnings.simplefilter("ignore")
        return _judge_here(subject, self_check)


def _judge_here(subject: str, self_check: bool) -> Verdict:
    from hf_usp import UspError
    from hf_usp.models.selfcheck.determinism import DeterministicSampling

    try:
        reference = tiny_model(subject, "eager").train()
    except Exception as problem:
        return Verdict.everywhere(UNBUILT, _words(problem))
    try:
        model = tiny_model(subject, "usp").train()
        attached = attach_to(model, CASES["plain"], self_check)
    except UspError as refusal:
        return Verdict.everywhere(REFUSED, _found(refusal))
    except Exception as problem:
        return Verdict.everywhere(CRASH, _words(problem))
    with DeterministicSampling() as seen:
        expected, problems = _references(reference)
    verdict, mesh = Verdict(drawn=tuple(sorted(seen.drawn))), CASES["plain"]
    with DeterministicSampling() if _somewhere(seen.drawn or any(problems)) else nullcontext():
        for rank, (form, degrees) in enumerate(CASES.items()):
            if problems[rank]:
                verdict.add(form, UNRUN, problems[rank])
                continue
            if REFUSED in verdict.forms.values():
                attached = attach_to(model, degrees, self_check)
            elif degrees != mesh:
                attached = attach_again(model, degrees, attached)
            mesh = degrees
            _try(verdict, form, model, expected if rank == dist.get_rank() else None)
            if form == "packed" and APART in verdict.reasons.get("packed", ""):
                _by_seq_lens(verdict, model, reference)
            if CRASH in verdict.forms.values():
                break
    return verdict


def _try(verdict: Verdict, form: str, model: Any, expected: Step | None, batch: str = "") -> None:
    """One form of a batch, sharded; the rank that has the reference says whether it is exact."""
    from hf_usp import UspError

    try:
        got = step(model, batch or form)
    except UspError as refusal:
        verdict.add(form, REFUSED, _found(refusal))
        return
    except Exception as problem:
        verdict.add(form, CRASH, _words(problem))
        return
    got.average_gradients()
    if form == "packed":
        verdict.packed_by = "cu_seq_lens" if batch else "position_ids"
    if expected is not None:
        error = expected.largest_error(got)
        right = error < TOLERANCE
        verdict.error = max(verdict.error, error) if right else 0.0
        verdict.add(form, EXACT if right else WRONG, "" if right else f"off by {error:.1e}")


def _by_seq_lens(verdict: Verdict, model: Any, reference: Any) -> None:
    """Packed documents with cu_seq_lens against the same documents one by one."""
    refused = verdict.forms.pop("packed"), verdict.reasons.pop("packed")
    expected, problem = None, ""
    if dist.get_rank() == list(CASES).index("packed"):
        try:
            expected = step_of_documents(reference)
        except Exception as error:
            problem = _words(error)
    problems = [""] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if any(problems):  # documents do not run by themselves: what position_ids gave stands
        verdict.add("packed", *refused)
    else:
        _try(verdict, "packed", model, expected, "flattened")


def _references(reference: Any) -> tuple[Step | None, list[str]]:
    """The reference of this rank's form, and for every form why there is none ("" where there is one)."""
    expected, problem = None, ""
    try:
        expected = step(reference, list(CASES)[dist.get_rank()])
        if not bool(expected.loss.isfinite()):
            problem = "its loss in one process is not finite"
    except Exception as error:
        problem = _words(error)
    problems = [""] * len(CASES)
    dist.all_gather_object(problems, problem)
    return expected, problems


def _somewhere(here: Any) -> bool:
    """Whether it is so on any rank."""
    flags = [False] * dist.get_world_size()
    dist.all_gather_object(flags, bool(here))
    return any(flags)


def attach_to(model: Any, degrees: tuple[int, int], self_check: bool) -> Any:
    """Do to a model as `Accelerator.prepare` does, on a mesh of (ring, ulysses) degrees."""
    from hf_usp.models.hooks import attach_hooks

    return attach_hooks(model, mesh_of(*degrees), gather_outputs=True, self_check=self_check)


def attach_again(model: Any, degrees: tuple[int, int], checked: Any) -> Any:
    """On another mesh, with what the self-check found about the model on the first (it takes most of the time)."""
    hooks = attach_to(model, degrees, False)
    hooks.traits, hooks.options = checked.traits, checked.options
    return hooks


@cache
def mesh_of(ring: int, ulysses: int) -> Any:
    """One set of process groups for a mesh in a process, however many models are judged on it."""
    import hf_usp

    return hf_usp.UspMesh.build(ring_degree=ring, ulysses_degree=ulysses)


@dataclass
class Step:
    """Results of one forward and backward: loss, logits of the tokens that are no padding, gradients by parameter."""

    loss: Tensor
    logits: Tensor
    gradients: list[Tensor]

    def average_gradients(self) -> None:
        """Over all ranks, as DDP does."""
        flat = torch.cat([gradient.flatten() for gradient in self.gradients])
        dist.all_reduce(flat)
        parts = (flat / dist.get_world_size()).split([gradient.numel() for gradient in self.gradients])
        self.gradients = [part.view_as(old) for part, old in zip(parts, self.gradients, strict=True)]

    def largest_error(self, other: Step) -> float:
        """The largest relative error in `other`; gradients next to nothing are measured against all of them."""
        floor = 1e-3 * torch.stack([gradient.norm() for gradient in self.gradients]).norm()
        errors = [(other.loss - self.loss).abs() / self.loss.abs(), _relative(other.logits, self.logits, 0.0)]
        for mine, theirs in zip(other.gradients, self.gradients, strict=True):
            errors.append(_relative(mine, theirs, floor))
        worst = torch.stack(errors).max().item()
        return worst if worst == worst else float("inf")


def step(model: Any, form: str) -> Step:
    """Forward and backward of a batch."""
    batch = batch_of(form)
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    seen = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    return Step(out.loss.detach(), out.logits.detach()[seen], gradients_of(model))


def step_of_documents(model: Any) -> Step:
    """Forward and backward of the packed documents, one by one."""
    model.zero_grad()
    takes = set(inspect.signature(type(model).forward).parameters)
    outs = []
    for document in documents_of(batch_of("flattened")):
        positions = {} if "position_ids" in takes else {"position_ids"}
        outs.append(model(**{name: value for name, value in document.items() if name not in positions}))
        outs[-1].loss.backward()
    loss = torch.stack([out.loss.detach() for out in outs]).sum()
    return Step(loss, torch.cat([out.logits.detach()[0] for out in outs]), gradients_of(model))


def gradients_of(model: Any) -> list[Tensor]:
    """A parameter that no token of a rank used (an expert, say) has no gradient there: zeros."""
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def _relative(mine: Tensor, theirs: Tensor, floor: Tensor | float) -> Tensor:
    return (mine - theirs).norm() / (theirs.norm() + floor)


def _found(refusal: Exception) -> str:
    """The finding of a `UspError`, without its rule and remedy."""
    return str(refusal).removeprefix("usp: ").split(". Rule: ")[0]


def _words(problem: Exception) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:300]
