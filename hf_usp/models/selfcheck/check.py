"""The self-check: before its first sharded batch a model shows on a short random one that sharding changes nothing.

The same few tokens run through the model twice, sharded and in full. The outputs of all its modules and the loss are
compared: the verdict. Whatever looks at other tokens outside the attention interface (recurrent and convolutional
layers, pooling, positions that are counted instead of passed) shows there, without a list of names. A few other batches
measure traits of the model (`traits.MeasuredTraits`).

It runs below the model's own hooks, so FSDP and DDP do not notice. It leaves the random state, parameters
(`isolation`), buffers, gradients and training flags as they were.

Before the first forward in training mode the batch goes through once more in that mode (`training_check`).
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...batch.context import ShardOptions
from ...batch.shard import IGNORED
from ...distributed.comm import all_gather, verify_same_across_ranks
from ...distributed.mesh import UspMesh
from ...errors import UspError, UspModelError
from ...utils.dtypes import no_autocast
from ..backbone import accepts_any_keyword, find_backbone
from ..compressed_layers import compresses
from ..indexed_layers import small_selections
from ..positions import length_dependent_ropes, may_count_visible, temperature_tuned, visible_positions
from ..traits import MeasuredTraits, ModelTraits
from .compare import compare
from .isolation import preserve_parameters


def measure(
    model: PreTrainedModel,
    traits: ModelTraits,
    mesh: UspMesh,
    options: ShardOptions,
    device: torch.device,
    verdict: bool = True,
) -> MeasuredTraits:
    """Traits that show only when the model runs, after the verdict of the self-check.

    verdict: raise `UspModelError` on every rank of the mesh if sharding changes the outputs of any module. Without it
    the same forwards run, but for the one in autocast's dtype, and a model that fails on a short random batch is
    unknown.
    """
    batch = random_batch(model, mesh, device)
    exact = without_autocast(options, device)  # asked before autocast is off
    with isolated_forward(model, device) as overwritten:
        try:
            if verdict:
                _give_verdict(model, batch, mesh, options, exact, overwritten)
            with small_selections(model):
                return _measure(model, traits, batch, mesh, exact)
        except Exception:
            if verdict:
                raise
            return MeasuredTraits()


def _give_verdict(
    model: PreTrainedModel,
    batch: dict[str, Any],
    mesh: UspMesh,
    options: ShardOptions,
    exact: ShardOptions,
    overwritten: set[str],
) -> None:
    device = batch["input_ids"].device
    try:
        found = compare(model, batch, mesh, exact)
        with small_selections(model) as selects:  # a short row is else shorter than what a query may select
            if selects:
                selected = compare(model, batch, mesh, exact)
                found = found or selected
        if exact is not options:
            with torch.autocast(device.type):  # again, in its dtype; on every rank: it communicates
                coarse = compare(model, batch, mesh, options)
            found = found or coarse
    except UspError:
        raise
    except Exception as problem:
        raise fails_alone(model, problem) from problem
    error = None if found is None else refusal(model, found)
    if overwritten:
        error = overwrites(model, overwritten)
    verify_same_across_ranks(torch.zeros(1, dtype=torch.int64, device=device), error, mesh.group, UspModelError)


def _measure(
    model: PreTrainedModel, traits: ModelTraits, batch: dict[str, Any], mesh: UspMesh, options: ShardOptions
) -> MeasuredTraits:
    ids = batch["input_ids"]
    length, device = ids.shape[1], ids.device
    first = length // 2 + 1
    restarting = torch.cat([torch.arange(first, device=device), torch.arange(length - first, device=device)])[None]

    def same(batch: dict[str, Any], options: ShardOptions = options) -> bool:
        """Whether a batch gives the same sharded and in full, on all ranks of the mesh."""
        differs = compare(model, batch, mesh, options) is not None
        return not bool(all_gather(torch.tensor([differs], dtype=torch.int64, device=device), mesh.group).any())

    left = {**batch, "attention_mask": _left_padding(batch)}
    counts_in_order = same(left)
    counts_visible = (
        not counts_in_order and may_count_visible(model) and same(left, replace(options, positions=visible_positions))
    )
    return MeasuredTraits(
        keeps_documents_apart=same({**batch, "position_ids": restarting}),
        counts_visible_tokens=counts_visible,
        knows_left_padding=counts_in_order or counts_visible,
        continues_from_states=traits.recurrent and same(batch, replace(options, pass_states=True)),
    )


def without_autocast(options: ShardOptions, device: torch.device) -> ShardOptions:
    """Options for a comparison in the dtype of the weights: the same ones where no autocast is on.

    Under autocast numbers are too coarse to compare (PEFT's wrapper, a loop of one's own). In the dtype of the weights
    any kernel does, for the run's may not know it; that one is compared as well, as coarse as its dtype.
    """
    return replace(options, kernel="eager") if torch.is_autocast_enabled(device.type) else options


def refusal(model: PreTrainedModel, found: str) -> UspModelError:
    return UspModelError(
        f"{type(model).__name__} computes something else when its sequence is sharded: {found}",
        rule="outside attention a token may not look at other tokens, and positions come from position_ids",
        remedy="train this model without UspParallelismConfig; if you know better, "
        "UspParallelismConfig(self_check=False) switches the check off",
    )


def fails_alone(model: PreTrainedModel, problem: Exception) -> UspModelError:
    return UspModelError(
        f"{type(model).__name__} fails on a short random batch of tokens: {problem}",
        rule="the self-check runs one row of tokens, sharded and whole",
        remedy="if the model needs more than tokens, UspParallelismConfig(self_check=False) goes without the check; "
        "then compare a step with one process yourself",
    )


def overwrites(model: PreTrainedModel, parameters: set[str]) -> UspModelError:
    return UspModelError(
        f"{type(model).__name__} overwrites {', '.join(sorted(parameters))} in its forward",
        rule="only the optimizer changes parameters, the same on all ranks; the self-check's short random batch has "
        "changed these, and cannot take it back",
        remedy="load the model again without what changes them (max_norm of an embedding, for one)",
    )


def _left_padding(batch: dict[str, Any]) -> Tensor:
    mask = torch.ones_like(batch["input_ids"])
    mask[:, :2] = 0
    return mask


def random_batch(model: PreTrainedModel, mesh: UspMesh, device: torch.device) -> dict[str, Any]:
    compressors: list[Any] = [module for module in model.modules() if compresses(module)]
    unit = max(2 * mesh.size, 4 * mesh.ring_degree, 6)
    most = max((2 * module.compress_rate for module in compressors), default=1)  # two windows of each
    length = -(-(most + 1) // unit) * unit - 1  # not a multiple: the last rank gets padding of ours, and a token
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, length), generator=generator)
    batch: dict[str, Any] = {"input_ids": ids.to(device)}
    forward = type(model).forward
    if "use_cache" in inspect.signature(forward).parameters or accepts_any_keyword(forward):
        batch["use_cache"] = False
    if ropes := length_dependent_ropes(model):
        # Around the length at which their frequencies change.
        start = max(0, min(_original_length(rope) for rope in ropes) - length // 2)
        batch["position_ids"] = torch.arange(start, start + length, device=device)[None]
    if find_backbone(model).token_loss:
        labels = ids.clone()
        labels[:, :2] = IGNORED
        batch["labels"] = labels.to(device)
    if hasattr(model.config.get_text_config(), "output_router_logits"):
        batch["output_router_logits"] = False  # a share has no auxiliary loss of its own, see router.py
    return batch


def _original_length(rope: Any) -> int:
    """The length up to which a length-dependent rotary embedding uses its original frequencies."""
    return int(getattr(rope, "original_max_seq_len", None) or rope.config.max_position_embeddings)


@contextmanager
def isolated_forward(model: PreTrainedModel, device: torch.device, training: bool = False) -> Iterator[set[str]]:
    """No gradients, no autocast and no dropout (or flags as they are, no checkpointing); all as before afterwards.

    Yields the names of parameters that were overwritten, which cannot be undone.
    """
    modules = list(model.modules())
    flags = [module.training for module in modules]
    buffers = [
        (module, name, b, b.clone()) for module in modules for name, b in module._buffers.items() if b is not None
    ]
    # Ropes change their own attributes; we let the temperature of Llama 4 change every other token (8,192 are usual).
    tuned: list[Any] = temperature_tuned(model)
    checkpointed: list[Any] = [module for module in modules if getattr(module, "gradient_checkpointing", False)]
    changing = [(module, dict(module.__dict__)) for module in (*length_dependent_ropes(model), *tuned)]
    python, numpy = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []))
        stack.enter_context(torch.no_grad())
        stack.enter_context(no_autocast(device))  # of PEFT's wrapper: numbers would be too coarse to compare
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # not a graph for a batch that comes once
        for module in modules:
            module.training = module.training and training
        for module in checkpointed:
            module.gradient_checkpointing = False
        for module in tuned:
            module.floor_scale = 2
        overwritten = stack.enter_context(preserve_parameters(model))
        try:
            yield overwritten
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for module, flag in zip(modules, flags, strict=True):
                module.training = flag
            for module in checkpointed:
                module.gradient_checkpointing = True
            for module, attributes in changing:
                module.__dict__.update(attributes)
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer.copy_(value)
