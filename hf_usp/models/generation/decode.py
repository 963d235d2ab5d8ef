"""A layer's attention while tokens are decoded from a `UspCache`.

The attention mask carries the cache to the layers, as it carries the context of a sharded forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...attention.decode import attend_to_held, merge_over_ranks
from ...batch.sharded_tensors import ContextMask, ShardedMask
from ...errors import UspMaskError, UspModelError
from ...kernels import Softmax, choose_kernel
from ...utils.dtypes import as_autocast, no_autocast
from .cache import UspCache

ATTRIBUTE = "usp_cache"


def carry_cache(mask_BS: Tensor, cache: UspCache) -> ContextMask:
    """The padding mask of the tokens so far, which carries the cache."""
    handle = torch.zeros(1, dtype=torch.int64, device="cpu")
    setattr(handle, ATTRIBUTE, cache)
    return ContextMask.of(mask_BS, handle)


def cache_of(mask: Any) -> UspCache | None:
    """The cache that a layer's attention mask carries; None in every other forward."""
    return getattr(mask.handle, ATTRIBUTE, None) if isinstance(mask, ShardedMask) else None


def attend_from_cache(
    module: torch.nn.Module,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    mask: ShardedMask,
    softmax: Softmax,
) -> Tensor:
    """Attention of new tokens over the keys of all ranks.

    Args:
        module: the layer.
        inputs: q [B, H, m, D] of the new tokens, k and v [B, G, n, D or E] of what the cache handed out, sinks [H].
        mask: the layer's mask.
        softmax: scaling and softcap.

    Returns:
        [B, m, H, E], bitwise the same on every rank.
    """
    cache = cache_of(mask)
    assert cache is not None
    query, key, value, sinks_H = inputs
    spec = mask.mask_spec
    layer, cache.latest = cache.latest, None
    if layer is None or key.shape[2] != layer.count:
        raise UspModelError(
            f"{type(module).__name__} attends to other keys than those that its cache handed out",
            rule="while tokens are decoded a layer attends once to this rank's keys, which it has added to its cache",
            remedy="use generate='whole'",
        )
    if spec.window_right != 0:
        raise UspMaskError(
            f"{type(module).__name__} decodes under {spec}",
            rule="tokens are decoded under causal masks, sliding windows and chunks",
            remedy="use generate='whole'",
        )
    q, k, v = as_autocast(*(x.transpose(1, 2) for x in (query, key, value)))
    chosen = choose_kernel(q.device, q.dtype, q.shape[3], softmax, cache.kernel, v.shape[3])
    with no_autocast(q.device):
        part = attend_to_held(q, k, v, cache.tiles(spec, layer), softmax, chosen)
        out = merge_over_ranks(part, sinks_H, cache.mesh).to(q.dtype)
    layer.forget(spec)
    return out
