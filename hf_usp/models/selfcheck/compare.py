"""How the self-check compares: the outputs of all modules and the loss of one batch, sharded and unsharded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...batch.context import ForwardContext, ShardOptions
from ...batch.layout import SequenceLayout
from ...batch.shard import shard_tensor
from ...distributed.comm import all_reduce_sum
from ...distributed.mesh import UspMesh
from ...errors import UspError, UspModelError
from ..backbone import find_backbone, recompute_pooler, shard_for_backbone
from ..look_back import runs_on_pieces

# Largest relative error: of any token, and in low precision, where rounding may flip a router's choice, of the median
# token. Shares are so short that an error at their edges reaches half of the tokens.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def compare(
    model: PreTrainedModel,
    batch: dict[str, Any],
    mesh: UspMesh,
    options: ShardOptions,
) -> str | None:
    """Differences on this rank between the sharded and the unsharded run of a batch, as text."""
    backbone = find_backbone(model)
    share, context = shard_for_backbone(backbone, model, batch, mesh, options)
    context.whole_layers = True
    layout = context.layout
    items = share.pop("num_labels", None)
    given = {} if items is None else {"num_items_in_batch": items}
    theirs, whole = module_outputs(model, batch)  # first: where it fails too, sharding is not the cause
    try:
        mine, sharded = module_outputs(model, share | given)
    except UspError:
        raise
    except Exception as problem:
        raise UspModelError(
            f"{type(model).__name__} fails on a short random batch when its sequence is sharded, and not on the whole "
            f"of it: {type(problem).__name__}: {problem}",
            rule="a model runs on this rank's tokens, with shift_labels and num_items_in_batch for its loss",
            remedy="train this model without UspParallelismConfig",
        ) from problem
    if not backbone.inside:
        recompute_pooler(model, sharded, layout, gathered=False)
    tolerance = tolerance_of(model, context)
    wrong_loss = _loss_difference(mesh, tolerance, sharded, whole)  # on every rank: it communicates
    if not context.reached_a_layer:
        return "no layer of it called the attention function"
    return (
        _difference(model, layout, tolerance, mine, theirs)
        or _output_difference(layout, tolerance, sharded, whole)
        or wrong_loss
    )


def tolerance_of(model: PreTrainedModel, context: ForwardContext) -> float:
    """The tolerance of the coarsest dtype in which a layer attended.

    Layers of quantized weights may round activations, to int8 or bf16, whatever the dtype around them.
    """
    rounds = getattr(model.config, "quantization_config", None) is not None
    attended = {shape.dtype for shape in context.attention_calls} or {torch.float32}
    return max(TOLERANCE[dtype] for dtype in attended | ({torch.bfloat16} if rounds else set()))


def module_outputs(model: PreTrainedModel, keywords: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """First floating-point tensor of each module, in the order in which modules finish, and the model's output."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, Tensor) and first.is_floating_point():
                seen.setdefault(name, first.detach())

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules() if name]
    try:
        output = model.forward(**keywords)
    finally:
        for handle in handles:
            handle.remove()
    return seen, output


def _difference(
    model: PreTrainedModel,
    layout: SequenceLayout,
    tolerance: float,
    mine: dict[str, Tensor],
    theirs: dict[str, Tensor],
) -> str | None:
    """The first module whose output differs on this rank's tokens, in words; None where none does.

    Each module is measured against the size of its own output: what a layer adds to the residual stream of a freshly
    initialised model is so small that logits would not show that it is wrong.
    """
    pieces = tuple(f"{name}." for name, module in model.named_modules() if runs_on_pieces(module))
    for name, whole in theirs.items():
        share = None if name.startswith(pieces) else mine.get(name)
        if share is None or whole.ndim < 3 or whole.shape[:2] != (1, layout.length):
            continue
        if share.shape == whole.shape:  # around the body that is cut
            errors = _errors(share, whole)
        elif share.shape == (1, layout.local_length, *whole.shape[2:]):
            ours = layout.local_indices(whole.device)[1]
            errors = _errors(share, shard_tensor(whole, layout))[: layout.local_length - ours]
        else:
            errors = torch.full((1,), float("inf"))
        error = errors.max() if tolerance < 1e-2 else errors.quantile(0.5)
        if not bool(error <= tolerance):
            kind = type(model.get_submodule(name)).__name__
            return (
                f"the first module whose output differs is {name} ({kind}), by {error.item():.1e} of its size on a "
                f"short random batch, where {tolerance:.0e} is allowed"
            )
    return None


def _output_difference(layout: SequenceLayout, tolerance: float, sharded: Any, whole: Any) -> str | None:
    """The first output without a dim of tokens (pooled, say) that differs, in words."""
    for name, theirs in whole.items():
        mine = sharded.get(name)
        if not isinstance(theirs, Tensor) or theirs.ndim == 0 or not theirs.is_floating_point():
            continue  # losses are looked at separately
        if not isinstance(mine, Tensor):
            return f"its output {name} is missing"
        if mine.shape != theirs.shape and mine.shape == (1, layout.local_length, *theirs.shape[2:]):
            continue  # of tokens; the modules that it comes from were compared
        if mine.shape != theirs.shape:
            return f"its output {name} has the shape {tuple(mine.shape)} instead of {tuple(theirs.shape)}"
        error = (mine - theirs).double().norm() / theirs.double().norm().clamp_min(1e-12)
        if not bool(error <= tolerance):
            return f"its output {name} differs by {error.item():.1e} of its size on a short random batch"
    return None


def _errors(mine: Tensor, theirs: Tensor) -> Tensor:
    """Error of each token [L], relative to the root mean square size of a token."""
    mine, theirs = mine.flatten(2)[0].double(), theirs.flatten(2)[0].double()
    size = theirs.norm(dim=-1).square().mean().sqrt().clamp_min(1e-12)
    return (mine - theirs).norm(dim=-1) / size


def _loss_difference(mesh: UspMesh, tolerance: float, sharded: Any, whole: Any) -> str | None:
    if whole.get("loss") is None:
        return None
    mine, theirs = all_reduce_sum(sharded.loss, mesh.group), whole.loss
    tolerance = max(tolerance, 1e-5)  # ForCausalLMLoss computes in fp32 at most
    if bool((mine - theirs).abs() <= tolerance * theirs.abs().clamp_min(1)):
        return None
    return f"its loss is {mine.item():.6f} instead of {theirs.item():.6f} on a short random batch"
