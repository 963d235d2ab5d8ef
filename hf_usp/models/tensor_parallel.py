"""Tensor and expert parallelism of Transformers (`DistributedConfig`) on the mesh: what is refused, what is mended."""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..errors import UspModelError

# Of gradients in these dtypes FSDP2 divides what no other rank shares twice (torch 2.11 to 2.13).
DIVIDED_TWICE = (torch.float16, torch.float64)


def check_tensor_parallel(model: PreTrainedModel) -> None:
    """Refuse tensor parallelism that leaves parts of a head on a rank, and gradients of experts that come out wrong."""
    ranks, config = getattr(model, "tp_size", None) or 1, model.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(config, name, None)
        if ranks > 1 and isinstance(count, int) and count % ranks:
            raise UspModelError(
                f"{type(model).__name__} with {name}={count} under tp_size={ranks}",
                rule="tensor parallelism gives every rank whole heads; what is left of them may be dealt unevenly to "
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


class PartialGradients:
    """Gradients of norms inside heads that tensor parallelism has cut (`q_norm`, `k_norm` of Qwen3), added up once.

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
