"""The auxiliary loss of a mixture of experts, over a sequence that is spread over ranks.

The load-balancing loss of Transformers (Switch Transformer, arXiv 2101.03961, equations 4 to 6; all layers together) is

    experts * sum over e of (share of the tokens' choices that fall on e) * (mean probability of e)

a product of two sums over tokens, so the losses of shards do not add up to it. Once the choices c_E and the tokens n
are counted over all ranks, it is linear in what is left: with this rank's sums of probabilities p_E, the ranks' shares

    experts * sum over e of c_E * p_E / n^2

add up to the loss of one process, and so do their gradients. The choices have none.

A prepared model is called without `output_router_logits`, so that it adds no loss of its own, and its body with it; the
share is added afterwards. That the formula, the coefficient and the use of the attention mask are the model's own is
seen on a short batch of one process before the first step.

Shape suffixes: T tokens of all rows of this rank, E experts, K experts that a token chooses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..batch.layout import SequenceLayout
from ..batch.sharded_tensors import context_of
from ..batch.unshard import unshard
from ..distributed.comm import all_reduce_sum, verify_same_across_ranks
from ..distributed.loss import reduce_loss
from ..distributed.mesh import UspMesh
from ..errors import UspModelError
from .selfcheck.check import isolated_forward
from .selfcheck.compare import TOLERANCE

# So many tokens that the loss over them is next to nothing, and rounds off nothing of the auxiliary one.
MANY = 2**40


@dataclass(frozen=True)
class AuxLossTerm:
    """The load-balancing loss that a model adds to its loss.

    Attributes:
        coefficient: its factor.
        chosen: experts of a token.
    """

    coefficient: float
    chosen: int


@dataclass(frozen=True)
class Sums:
    """Sums over all layers and some tokens.

    Attributes:
        choices: how often each expert was chosen, int64 [E].
        tokens: number of tokens, int64 [].
        probabilities: sum of the router probabilities [E].
    """

    choices: Tensor
    tokens: Tensor
    probabilities: Tensor

    def share(self, choices_E: Tensor, tokens: Tensor) -> Tensor:
        """These tokens' part of the loss [], given the choices and the number of all."""
        weights_E = choices_E.shape[0] * choices_E.double() / tokens.double().square()
        return (weights_E.to(self.probabilities.dtype) * self.probabilities).sum()


def add_up(router_logits: Sequence[Tensor], mask: Tensor, chosen: int) -> Sums:
    """Sums over all layers' router logits [T, E] and the tokens that the mask shows [B, L]; differentiable."""
    device, experts = router_logits[0].device, router_logits[0].shape[-1]
    seen_T = mask.reshape(-1).to(device).long()
    choices_E = torch.zeros(experts, dtype=torch.int64, device=device)
    probabilities_E = torch.zeros(experts, dtype=torch.float32, device=device)
    for logits in router_logits:
        weights_TE = torch.nn.functional.softmax(logits.to(device).reshape(-1, experts), dim=-1)
        chosen_TK = weights_TE.detach().topk(chosen, dim=-1).indices
        choices_E.scatter_add_(0, chosen_TK.flatten(), seen_T.repeat_interleave(chosen))
        # Not a product with 0: whatever padding computes stays out, infinities too.
        seen_TE = weights_TE.float().masked_fill(seen_T[:, None] == 0, 0.0)
        probabilities_E = probabilities_E + seen_TE.sum(0)
    return Sums(choices_E, seen_T.sum() * len(router_logits), probabilities_E)


def wants_router_logits(model: Any, batch: Mapping[str, Any]) -> bool:
    """Whether this call of a model asks for router logits and, with them, for the auxiliary loss."""
    asked = batch.get("output_router_logits")
    if asked is not None:
        return bool(asked)
    return any(getattr(c, "output_router_logits", False) for c in (model.config, model.config.get_text_config()))


class MoeAuxLoss:
    """The auxiliary loss of one prepared model."""

    def __init__(self, model: nn.Module) -> None:
        self.balance: AuxLossTerm | None = None
        self.known = False
        body: Any = model.base_model
        self._handle = body.register_forward_pre_hook(_ask_the_body, with_kwargs=True)

    def remove(self) -> None:
        self._handle.remove()

    def learn(self, model: Any, mesh: UspMesh, device: torch.device) -> None:
        """Find out, before the first use, what the model adds to its loss; `UspModelError` if we do not know that."""
        if not self.known:
            error = None
            with isolated_forward(model, device):
                try:
                    if model.base_model is not model:
                        self.balance = find_aux_loss(model, _short_batch(model, device))
                except UspModelError as refusal:
                    error = refusal
            verify_same_across_ranks(torch.zeros(1, dtype=torch.int64, device=device), error, mesh.group, UspModelError)
            self.known = True

    def add(self, output: Any, layout: SequenceLayout, mask_BL: Tensor, gather: bool) -> Any:
        """The output of a sharded forward with `aux_loss`, and with this rank's share of it in `loss`."""
        logits, mesh = output.get("router_logits"), layout.mesh
        changed: dict[str, Any] = {}
        if self.balance is not None:
            sums = add_up(logits, mask_BL, self.balance.chosen)
            counts = all_reduce_sum(torch.cat([sums.choices, sums.tokens[None]]), mesh.group)
            share = sums.share(counts[:-1], counts[-1])
            changed["aux_loss"] = reduce_loss(share, mesh.group, mesh.size)
            if output.get("loss") is not None:
                changed["loss"] = output["loss"] + self.balance.coefficient * share.to(output["loss"].device)
        if gather and logits:
            rows = (layout.batch, layout.local_length)
            changed["router_logits"] = tuple(unshard(x.reshape(*rows, -1), layout).flatten(0, 1) for x in logits)
        return type(output)(**{**output, **changed})


def _ask_the_body(body: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    context = context_of(*kwargs.values())
    if context is not None and context.wants_router_logits:
        return args, {**kwargs, "output_router_logits": True}
    return None


def _short_batch(model: Any, device: torch.device) -> dict[str, Tensor]:
    """Nine random tokens with labels, the last two of them padding."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, 9), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(ids)
    mask[:, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def find_aux_loss(model: Any, batch: Mapping[str, Any]) -> AuxLossTerm | None:
    """The term that the model adds to its loss for router logits, measured on a full batch with padding, or None.

    Raises `UspModelError` where that is not coefficient times the formula above.
    """
    keywords = {**batch, "num_items_in_batch": MANY, "use_cache": False}
    having = model.forward(**keywords, output_router_logits=True)
    without = model.forward(**keywords, output_router_logits=False)
    added = having.loss - without.loss
    if having.get("aux_loss") is None and bool(added == 0):
        return None
    text = model.config.get_text_config()
    names = ("router_aux_loss_coef", "aux_loss_coef")
    found = [getattr(owner, name, None) for owner in (model, text) for name in names]
    coefficient = next((x for x in found if x is not None), None)
    chosen = getattr(model, "num_experts_per_tok", None) or getattr(text, "num_experts_per_tok", None)
    if having.get("aux_loss") is not None and having.router_logits and chosen and coefficient is not None:
        sums = add_up(having.router_logits, batch["attention_mask"], chosen)
        ours = sums.share(sums.choices, sums.tokens)
        tolerance = TOLERANCE[having.router_logits[0].dtype]
        if _close(ours, having.aux_loss, tolerance) and _close(coefficient * ours, added, tolerance):
            return AuxLossTerm(float(coefficient), int(chosen))
    raise UspModelError(
        f"{type(model).__name__} with output_router_logits=True and an auxiliary loss of its own",
        rule="the auxiliary loss is Transformers' load_balancing_loss_func over the tokens that the attention_mask "
        "shows, times router_aux_loss_coef; that of other formulas cannot be added up over shards",
        remedy="set output_router_logits=False in the model's config",
    )


def _close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    return bool((ours - theirs).abs() <= tolerance * theirs.abs())
