"""Tensor and expert parallelism of Transformers (`DistributedConfig`) on the mesh: refusals and corrections."""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..distributed.loss import VocabularyPart
from ..errors import UspModelError
from .pickling import NotSaved

# Of gradients in these dtypes FSDP2 divides what no other rank shares twice (torch 2.11 to 2.13).
DIVIDED_TWICE = (torch.float16, torch.float64)
# Plans of Transformers for a vocabulary head: its rows spread and its logits gathered; or nothing.
BY_ROWS = ("colwise_gather_output", "colwise_rep")
WHOLE = (None, "replicate")


def check_tensor_parallel(model: PreTrainedModel) -> None:
    """Reject tensor-parallel sizes that split an attention head, and two cases that Transformers alone computes wrong.

    These are gradients of experts in fp16 and fp64, and unevenly sharded tied embeddings, both under its own FSDP.
    """
    ranks, config = getattr(model, "tp_size", None) or 1, model.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(config, name, None)
        if ranks > 1 and isinstance(count, int) and count % ranks:
            raise UspModelError(
                f"{type(model).__name__} with {name}={count} under tp_size={ranks}",
                rule="tensor parallelism gives every rank whole heads; what is left of them may be split unevenly over "
                "ulysses ranks",
                remedy=f"choose a tp_size that divides {count}, and more ranks for cp_size",
            )
    distributed = getattr(model.config, "distributed_config", None)
    experts = getattr(distributed, "ep_size", None) or 1
    dtypes = {p.dtype for p in model.parameters()}.intersection(DIVIDED_TWICE)
    if distributed is not None and experts > 1 and distributed.efsdp_size == 1 and dtypes:
        raise UspModelError(
            f"{type(model).__name__} in {dtypes.pop()} under ep_size={experts}",
            rule="where every expert lies on one rank (ep_size = fsdp_size x tp_size), FSDP2 divides gradients in fp16 "
            "and fp64 twice",
            remedy="load the weights in float32 or bfloat16, or choose a smaller ep_size",
        )
    _check_tied(model, getattr(distributed, "fsdp_size", None) or 1, ranks)


def _check_tied(model: PreTrainedModel, fsdp_size: int, tp_size: int) -> None:
    """Under Transformers' own FSDP (5.23) embeddings and head gather one weight each for itself.

    Where the rows of a rank do not come out even, one of them pads a copy of its own, which no step changes.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if fsdp_size == 1 or head is None or getattr(head, "weight", None) is not getattr(embeddings, "weight", head):
        return
    parts = fsdp_size * (1 if _placement(head.weight) is None else tp_size)
    if len(head.weight) % parts:
        raise UspModelError(
            f"{type(model).__name__} with embeddings tied to its head, {len(head.weight)} entries under "
            f"fsdp_size={fsdp_size}, tp_size={tp_size}",
            rule="Transformers' FSDP trains tied embeddings right where all ranks hold equally many entries; else the "
            "head, or the embeddings, stay what they were",
            remedy=f"pad the vocabulary (resize_token_embeddings(pad_to_multiple_of={parts}), then save and load), or "
            "shard with FSDP2 of Accelerate (TrainingArguments(fsdp=...)) instead",
        )


def head_is_cut(model: PreTrainedModel) -> bool:
    """Whether each rank of tensor parallelism holds some rows of the vocabulary head; False where it is there whole.

    `UspModelError` where the plan spreads the head in another way.
    """
    if (getattr(model, "tp_size", None) or 1) == 1:
        return False
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), "")
    style = next((how for pattern, how in (model.tp_plan or {}).items() if fnmatchcase(name, pattern)), None)
    placement = _placement(getattr(head, "weight", None))
    if placement is None and style in WHOLE:
        return False
    forwards = type(head).forward, vars(head).get("forward")  # that of the class, and what Transformers has put there
    linear = forwards[0] is nn.Linear.forward and getattr(forwards[1], "__module__", "").startswith("transformers.")
    if placement is None or not placement.is_shard(0) or style not in BY_ROWS or not linear:
        raise UspModelError(
            f"loss_chunk_size with {type(model).__name__} under tp_size={model.tp_size}, whose vocabulary head "
            f"({type(head).__name__}) is laid out as {style!r} with weights {placement or 'whole'}",
            rule="a loss in chunks follows one linear head, whole on every rank or spread over them by entries of the "
            f"vocabulary ({', '.join(BY_ROWS)})",
            remedy='load the model with DistributedConfig(tp_plan={"lm_head": "colwise_gather_output"}, ...) and train '
            "its head without an adapter, or leave out loss_chunk_size",
        )
    return True


def rows_of_head(head: nn.Linear) -> tuple[Tensor, Tensor | None, VocabularyPart]:
    """This rank's rows of weight [N, D] and bias [N], whose gradients go back, and which entries they are."""
    weight_VD: Any = head.weight
    bias_V: Any = head.bias
    mesh, own_ND = weight_VD.device_mesh, weight_VD.to_local()
    most = -(-len(weight_VD) // mesh["tp"].size())
    start = min(mesh.get_local_rank("tp") * most, len(weight_VD))
    assert len(own_ND) == min(most, len(weight_VD) - start), "rows are split as torch.chunk does"
    part = VocabularyPart(mesh.get_group("tp"), start, len(weight_VD))
    return own_ND, None if bias_V is None else bias_V.to_local(), part


def _placement(weight: Any) -> Any:
    """How tensor parallelism lays out a DTensor; None for what it left whole."""
    names = getattr(getattr(weight, "device_mesh", None), "mesh_dim_names", None) or ()
    return weight.placements[names.index("tp")] if "tp" in names else None


class PartialGradients(NotSaved):
    """Gradients of norms inside heads that tensor parallelism has sharded (`q_norm`, `k_norm` of Qwen3), added up once.

    Every rank has the part of its heads. Transformers 5.23 sums them over ranks once they are in `.grad`, and with them
    what `.grad` held from earlier micro-batches, which was summed already. Here that is set aside meanwhile.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.handles: list[RemovableHandle] = []
        self.watched: list[nn.Parameter] = []
        self.aside: dict[int, Tensor] = {}
        if (getattr(model, "tp_size", None) or 1) == 1:
            return
        patterns = [name for name, how in (model.tp_plan or {}).items() if how == "replicated_with_grad_allreduce"]
        for name, module in model.named_modules():
            if any(fnmatchcase(name, pattern) for pattern in patterns):
                # After its forward Transformers has put its own hook on the parameter; ours come around it.
                self.handles.append(module.register_forward_hook(self._watch))

    def release(self) -> None:
        for handle in self.handles:
            handle.remove()

    @torch.compiler.disable
    def _watch(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Under FSDP2 the parameters of a forward are others than those of the module outside of it."""
        for p in module.parameters(recurse=False):
            if torch.is_grad_enabled() and p.requires_grad and not any(p is known for known in self.watched):
                self.watched.append(p)
                self.handles.append(p.register_hook(partial(self._set_aside, p)))
                self.handles.append(p.register_post_accumulate_grad_hook(self._add))

    def _set_aside(self, p: nn.Parameter, grad: Tensor) -> None:
        if p.grad is not None:
            self.aside[id(p)], p.grad = p.grad, None

    def _add(self, p: Tensor) -> None:
        earlier = self.aside.pop(id(p), None)
        if earlier is not None:
            assert p.grad is not None
            p.grad += earlier
