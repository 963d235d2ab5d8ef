"""The forwards that `generate` makes with a `UspCache`: the prefill, which is sharded, and steps of new tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...batch.shard import get_tokens
from ...distributed.failures import on_every_rank
from ...distributed.mesh import UspMesh
from ...errors import UspBatchError, UspModelError
from ..unsharded import CACHES
from .cache import UspCache
from .decode import carry_cache


def usp_cache_in(batch: Mapping[str, Any]) -> UspCache | None:
    """The `UspCache` that a call of the model passes, if it does."""
    return next((cache for name in CACHES if isinstance(cache := batch.get(name), UspCache)), None)


def other_mesh(cache: UspCache, mesh: UspMesh) -> UspModelError:
    return UspModelError(
        f"a cache that was made for a mesh of the ranks {cache.mesh.ranks}, on one of {mesh.ranks}",
        rule="the ranks that hold a cache's keys are those that decode from it",
        remedy="generate from the prompt again, without the cache",
    )


def check_cache(cache: UspCache, mesh: UspMesh, batch: Mapping[str, Any]) -> None:
    """Refuse a cache that this forward cannot continue."""
    if cache.mesh.ranks != mesh.ranks:
        raise other_mesh(cache, mesh)
    if batch.get("use_cache") is False:
        raise UspModelError(
            "use_cache=False beside a cache",
            rule="tokens that are decoded from a cache are added to it",
            remedy="leave out use_cache, or the cache",
        )
    if cache.in_prefill or cache.seen != cache.length:
        raise UspModelError(
            "a cache of a forward that failed",
            rule="a cache holds keys of every token that was seen",
            remedy="generate from the prompt again, without the cache",
        )


def check_padding(mask: Any, length: int) -> None:
    """Refuse padding among the tokens that come after a cache of `length` tokens, or at the end of prompts."""
    if isinstance(mask, Tensor) and mask.ndim == 2:
        last = mask[:, length:] if length else mask[:, -1:]
        if not bool(last.all()):
            raise on_every_rank(
                UspBatchError(
                    "padding after a token of a prompt (attention_mask)",
                    rule="prompts are padded on the left, in their first forward",
                    remedy="tokenize with padding_side='left', and without prefill_chunk_size where rows are padded",
                )
            )


def check_same_padding(mask: Any, cache: UspCache, count: int) -> None:
    """Refuse another padding of the tokens in the cache than that of their prefill. Single tokens keep that."""
    first_B = torch.from_numpy(cache.first_B)
    if mask is None:
        other = bool(first_B.any())
    else:
        other = count > 1 and not torch.equal(mask[:, : cache.length].int().argmax(1).cpu(), first_B)
    if other:
        raise on_every_rank(
            UspBatchError(
                "other padding (attention_mask) than that of the prompts in the cache",
                rule="the tokens in a cache stay where they are",
                remedy="pass the attention_mask of all tokens, which begins as that of the first call",
            )
        )


def number_kept(batch: Mapping[str, Any], count: int) -> int:
    """How many last tokens of `count` a caller wants the logits of; what comes after them may be taken back."""
    keep = batch.get("logits_to_keep")
    return min(keep, count) if isinstance(keep, int) and keep > 0 else count


def step_inputs(batch: dict[str, Any], cache: UspCache) -> dict[str, Any]:
    """Keywords for a forward of new tokens, which every rank computes in full."""
    tokens = get_tokens(batch)
    rows, count = tokens.shape[:2]
    if rows != len(cache.first_B):
        raise UspBatchError(
            f"{rows} row(s) of new tokens for a cache of {len(cache.first_B)}",
            rule="a cache serves the rows that it was made from",
            remedy="pass as many rows as before, or leave the cache out",
        )
    mask, length = batch.get("attention_mask"), cache.length
    check_padding(mask, length)
    check_same_padding(mask, cache, count)
    cache.begin_step(count, number_kept(batch, count))
    if mask is None:
        mask = torch.ones(rows, 1, dtype=torch.bool, device=tokens.device).expand(rows, cache.seen)
    return {**batch, "attention_mask": carry_cache(mask, cache)}
