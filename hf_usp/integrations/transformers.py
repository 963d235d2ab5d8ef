"""Context parallelism of one Transformers model: applied, removed, described.

`apply_context_parallel` is the one way in: `Accelerator.prepare` (`integrations/accelerate.py`), hand-written loops and
the command line call it. `MODEL_CHANGES` lists what it changes on a model, in the order in which it is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from ..distributed.agreement import verify_same_on_all_processes
from ..distributed.mesh import UspMesh
from ..errors import UspConfigError, UspModelError
from ..kernels import KERNELS
from ..memory.activation_checkpointing import restore_context_functions, use_plain_function, uses_plain_function
from ..memory.activation_offload import offload_checkpoints as offload_model
from ..memory.activation_offload import offloads_checkpoints, restore_checkpoints
from ..memory.chosen import chosen_memory
from ..memory.chunked_loss import ChunkedLoss, chunked_loss
from ..memory.offloader import ActivationOffloader
from ..memory.tiled_layer import tile_layers, tiled_layer, untile_layers
from ..memory.tiled_mlp import TiledMLP, chunked, tile_mlps, untile
from ..memory.tiled_norm import TiledNorm, tile_norms
from ..models.consistency import describe_model
from ..models.find import find_model
from ..models.generation.entry import check_way
from ..models.hooks import ContextParallelHooks, attach_hooks, get_hooks
from ..models.indexed_layers import selects_keys
from ..models.traits import inspect_model
from ..sharding.load_balance import ALL_ORDERS
from ..utils.validation import check_switches
from .memory_choice import AUTO, choose_memory, memory_options, validate_memory_options


class Change(NamedTuple):
    """Something of a model that hf_usp changes.

    Attributes:
        target: the object that is changed.
        what: the hook or attribute.
        why: what it is for.
        present: whether it is there, given the model (of whatever wraps it) and its hooks.
    """

    target: str
    what: str
    why: str
    present: Callable[[nn.Module, ContextParallelHooks | None], bool]


def _hooked(model: nn.Module, hooks: ContextParallelHooks | None) -> bool:
    return hooks is not None


MODEL_CHANGES = (
    Change(
        "layers with activation checkpointing",
        "`context_fn` of `save_attention_outputs`",
        "torch.compile takes only functions",
        lambda model, _: uses_plain_function(model),
    ),
    Change(
        "the model, and its head during a forward",
        "forward pre-hook, forward hook; the head's `forward`; FSDP2's reshard flag of the head",
        "`loss_chunk_size`: the loss is computed in chunks",
        lambda model, _: chunked_loss(model) is not None,
    ),
    Change(
        "MLPs",
        "`forward`",
        "`mlp_chunk_size`: MLPs compute in chunks",
        lambda model, _: any(chunked(module, TiledMLP) for module in model.modules()),
    ),
    Change(
        "norms that torch does not compute itself",
        "`forward`",
        "`mlp_chunk_size`: norms compute in chunks",
        lambda model, _: any(chunked(module, TiledNorm) for module in model.modules()),
    ),
    Change(
        "layers that Transformers can checkpoint",
        "`forward`",
        "`layer_chunk_size`: layers compute in chunks, attention in groups of heads",
        lambda model, _: any(tiled_layer(module) is not None for module in model.modules()),
    ),
    Change(
        "the model, and its checkpointed layers",
        "forward pre-hook; the layers' checkpointing function",
        "`offload_checkpoints`: inputs of checkpointed layers, and what `keep_attention` keeps, are in host memory",
        lambda model, _: offloads_checkpoints(model),
    ),
    Change(
        "the model, and its layers",
        "forward pre-hook; the layers' `gradient_checkpointing`",
        '`memory="auto"`: the way to save memory is chosen for each batch',
        lambda model, _: chosen_memory(model) is not None,
    ),
    Change(
        "recurrent layers",
        "`forward`: the same code with sharded kernels; forward pre-hook",
        "states cross the edges of shards",
        lambda _, hooks: hooks is not None and bool(hooks.recurrent.layers),
    ),
    Change(
        "layers that select their keys, and their indexers",
        "forward pre-hook, `expand_kv`; the indexers' `forward`",
        "a layer is lent a cache with the keys of all ranks; its indexer runs over chunks of queries",
        lambda _, hooks: hooks is not None and bool(hooks.indexed.layers),
    ),
    Change(
        "layers that attend to compressed entries, and their compressors",
        "forward pre-hook; the compressors' forward hook; the indexers' `forward`",
        "a layer is lent a cache with the tokens of all ranks; its indexer runs over chunks of queries",
        lambda _, hooks: hooks is not None and bool(hooks.compressed.layers),
    ),
    Change(
        "recurrences that are methods (RG-LRU)",
        "forward pre-hook; `_rnn_scan`; the convolution's `forward`",
        "states cross the edges of shards",
        lambda _, hooks: hooks is not None and bool(hooks.gated.layers),
    ),
    Change(
        "layers of lightning attention",
        "`forward`: the same loop over blocks, on whole documents and some heads",
        "states cross the edges of shards",
        lambda _, hooks: hooks is not None and bool(hooks.lightning.layers),
    ),
    Change(
        "modules that look a few tokens back",
        "`forward`: the same code on runs of tokens, each after the tokens before it",
        "n-grams and convolutions cross the edges of shards",
        lambda _, hooks: hooks is not None and bool(hooks.look_back.modules),
    ),
    Change(
        "embeddings of places in a row, and the decoder around them",
        "forward pre-hooks",
        "a rank's tokens get their places in the full row",
        lambda _, hooks: hooks is not None and bool(hooks.places.embeddings),
    ),
    Change(
        "norms that Transformers' tensor parallelism replicates inside heads",
        "forward hook; gradient hooks on their parameters",
        "gradients of several micro-batches are summed once",
        lambda _, hooks: hooks is not None and bool(hooks.partial.handles),
    ),
    Change(
        "the model",
        "forward pre-hook `pre_forward`",
        "shards the full batch",
        _hooked,
    ),
    Change(
        "the model",
        "forward hook `post_forward`",
        "reduces the loss over ranks, gathers outputs",
        _hooked,
    ),
    Change(
        "the model",
        "forward hook `on_error` (also called after an exception)",
        "tells the other ranks why this one failed",
        _hooked,
    ),
    Change(
        "the backbone, where it is a module inside the model",
        "forward pre-hook, forward hook",
        "shards the inputs there, gathers hidden states for the head around it",
        lambda _, hooks: hooks is not None and hooks.backbone.inside,
    ),
    Change(
        "the base model",
        "forward pre-hook",
        "asks for router logits: the load-balancing loss of experts is added afterwards",
        _hooked,
    ),
    Change(
        "modules of the backbone",
        "attribute `_usp_prepared`",
        "they refuse a full batch in a training step",
        _hooked,
    ),
    Change(
        "the model",
        "`forward`",
        "wrappers that call `model.forward(...)` run the hooks too",
        _hooked,
    ),
    Change(
        "a model that generates",
        "`generate`",
        "its forwards are told from others; with `generate=` by rows, or with the prompt sharded",
        lambda _, hooks: hooks is not None and hooks.generation.generate is not None,
    ),
)


def apply_context_parallel(
    model: nn.Module,
    mesh: UspMesh,
    *,
    sequence_order: str = "auto",
    gather_outputs: bool | None = None,
    self_check: bool = True,
    kernel: str | None = None,
    loss_chunk_size: int | None = None,
    mlp_chunk_size: int | None = None,
    layer_chunk_size: int | None = None,
    head_groups: int | None = None,
    keep_attention: bool | int = False,
    offload_checkpoints: bool | str = False,
    memory: str | Mapping[str, Any] | None = None,
    generate: str = "whole",
) -> nn.Module:
    """Make a Transformers model take full batches and shard them over `mesh`. Every process of the world calls it.

    The model then returns the loss of the full batch on every rank. Gradients are right after an average over all ranks
    of the world (DDP, FSDP2, ZeRO, or `all_reduce` and a division in a loop of your own). Applying again replaces what
    was applied before. `remove_context_parallel` restores the model.

    Args:
        model: a `PreTrainedModel` with `attn_implementation="usp"`, or a module around one (PEFT, DDP).
        mesh: see `UspMesh.build`. On a mesh of one rank only the memory options below change anything; but layers whose
            queries select their keys then compute in chunks (`docs/indexed-attention.md`).
        sequence_order, gather_outputs, self_check, kernel, loss_chunk_size, mlp_chunk_size, layer_chunk_size,
            head_groups, keep_attention, offload_checkpoints, memory, generate: see `UspParallelismConfig`.

    Returns:
        `model` itself.

    Raises:
        UspError: the model or an option does not fit, or ranks differ in them; on every rank.
    """
    given = {"loss_chunk_size": loss_chunk_size, "mlp_chunk_size": mlp_chunk_size}
    given |= {"layer_chunk_size": layer_chunk_size, "head_groups": head_groups, "keep_attention": keep_attention}
    options = memory_options(memory, given | {"offload_checkpoints": offload_checkpoints})
    validate_options(sequence_order, kernel)
    check_way(generate)
    validate_memory_options(options, memory, gather_outputs, mesh.size)
    check_switches(gather_outputs=gather_outputs is None or gather_outputs)
    check_switches(self_check=self_check)
    if mesh.size > 1:
        verify_same_on_all_processes(describe_model(find_model(model)))
    if options["head_groups"] is not None:
        check_head_groups(find_model(model), options["head_groups"], mesh.ulysses_degree)
    apply_memory_options(model, **options)
    alone = mesh.size == 1
    if not alone or selects_keys(find_model(model)):
        attach_hooks(
            model,
            mesh,
            sequence_order=sequence_order,
            kernel=kernel,
            gather_outputs=alone or gather_outputs,  # one rank's share is everything
            self_check=self_check,
            generate=generate,
        )
    if memory == AUTO:
        found = find_model(model)
        choose_memory(found, mesh, found.device)
    return model


def apply_memory_options(
    model: nn.Module,
    loss_chunk_size: int | None,
    mlp_chunk_size: int | None,
    offload_checkpoints: bool | str,
    *,
    layer_chunk_size: int | None = None,
    head_groups: int | None = None,
    keep_attention: bool | int = False,
) -> None:
    """Apply the options that save memory. Applying them again changes nothing."""
    use_plain_function(model)
    if loss_chunk_size is not None and chunked_loss(model) is None:
        ChunkedLoss(find_model(model), loss_chunk_size)
    if mlp_chunk_size is not None:
        tile_mlps(find_model(model), mlp_chunk_size)
        tile_norms(find_model(model), mlp_chunk_size)
    if layer_chunk_size is not None:
        tile_layers(find_model(model), layer_chunk_size, head_groups or 1, keep_attention)
    if offload_checkpoints:
        folder = offload_checkpoints if isinstance(offload_checkpoints, str) else None
        offload_model(find_model(model), ActivationOffloader(folder))


def remove_from_model(model: nn.Module) -> None:
    """Restore a model: everything of `MODEL_CHANGES` is taken back."""
    hooks = get_hooks(model)
    if hooks is not None:
        hooks.remove()
    loss = chunked_loss(model)
    if loss is not None:
        loss.remove()
    chosen = chosen_memory(model)
    if chosen is not None:
        chosen.remove()
    untile_layers(model)
    untile(model)
    restore_checkpoints(model)
    restore_context_functions(model)


def describe(model: nn.Module) -> str:
    """The traits of a model and the changes that hf_usp has made to it, one a line."""
    found = find_model(model)
    hooks = get_hooks(model)
    traits = inspect_model(found) if hooks is None else hooks.traits
    changes = [f"{c.target}: {c.what} ({c.why})" for c in MODEL_CHANGES if c.present(found, hooks)]
    lines = [type(found).__name__, *(f"  {line}" for line in traits.lines())]
    if hooks is not None:
        mesh = hooks.mesh
        lines.append(f"  mesh: ring {mesh.ring_degree} x ulysses {mesh.ulysses_degree}")
    return "\n".join([*lines, "changed by hf_usp:", *(f"  {change}" for change in changes or ["nothing"])])


def validate_options(sequence_order: str, kernel: str | None) -> None:
    """Raise `UspConfigError` for orders and kernels that do not exist."""
    if sequence_order not in ("auto", *ALL_ORDERS):
        raise UspConfigError(
            f"sequence_order={sequence_order!r}",
            rule=f"it is one of auto, {', '.join(ALL_ORDERS)}",
            remedy="use 'auto'",
        )
    if kernel is not None and kernel not in list(KERNELS):
        raise UspConfigError(
            f"kernel={kernel!r}",
            rule=f"a kernel is one of {', '.join(KERNELS)}, or None",
            remedy="leave it out to let hf_usp choose",
        )


def check_head_groups(model: PreTrainedModel, head_groups: int, ulysses_degree: int) -> None:
    """Raise `UspModelError` for more groups than there are heads for the ulysses ranks."""
    heads = getattr(model.config.get_text_config(), "num_attention_heads", None)
    if heads is not None and head_groups * ulysses_degree > heads:
        raise UspModelError(
            f"head_groups={head_groups} for {heads} query heads on {ulysses_degree} ulysses rank(s)",
            rule="a group of heads has a head for every ulysses rank",
            remedy="leave out head_groups, or choose at most the query heads of an ulysses rank",
        )
