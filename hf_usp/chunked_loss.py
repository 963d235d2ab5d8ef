"""The loss of a vocabulary head in chunks of tokens: no rank ever holds all of its logits.

At 131,072 tokens and a vocabulary of 150,000 the logits alone are 73 GiB in fp32. Here the head's input is swapped for
a stand-in. `torch.nn.functional.linear` of it is a stand-in for the logits, which remembers what the model does to them
on the way to its loss (scaling, tanh of a softcap, casts), and `cross_entropy` of that does the work: for every chunk
of tokens logits, their transformations and the loss; in the backward the same again, and their gradient, which is spent
on the gradients of hidden states and weight at once. The model and its loss function run unchanged; whatever else a
model does with its logits is refused by name.

Weight gradients are summed over chunks in fp32 (or fp64), so bf16 loses nothing by chunks.

Shape suffixes: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .bodies import find_body
from .errors import UspModelError
from .kernels import accumulation_dtype

Change = Callable[[Tensor], Tensor]


class ChunkedLoss:
    """The hooks of one model whose loss is computed in chunks of `chunk` tokens whenever it gets labels.

    Its outputs then hold no `logits`. Raises `UspModelError` for a model without a vocabulary head or with another loss
    than Transformers' ForCausalLMLoss.
    """

    def __init__(self, model: PreTrainedModel, chunk: int) -> None:
        if not find_body(model).token_loss or model.get_output_embeddings() is None:
            raise UspModelError(
                f"loss_chunk with {type(model).__name__}",
                rule="a loss in chunks is a sum over tokens (ForCausalLMLoss) of a linear vocabulary head",
                remedy="use the model's ForCausalLM class, or leave out loss_chunk",
            )
        self.chunk = chunk
        self._on_head: RemovableHandle | None = None
        self._handles = (
            model.register_forward_pre_hook(self.begin, with_kwargs=True),
            model.register_forward_hook(self.end, with_kwargs=True, always_call=True),
        )

    def remove(self) -> None:
        """The model is as it was before."""
        for handle in self._handles:
            handle.remove()

    @torch.compiler.disable
    def begin(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before a forward with labels: the head will get a stand-in."""
        head = model.get_output_embeddings()
        if kwargs.get("labels") is None and kwargs.get("shift_labels") is None:
            return
        if any(hasattr(p, "ds_id") for p in head.parameters()):
            raise UspModelError(
                "loss_chunk with a vocabulary head partitioned by ZeRO-3",
                rule="the weight of the head stays gathered from the head to the loss",
                remedy="use ZeRO-2 or FSDP2, or leave out loss_chunk",
            )
        for unit in _fsdp_units(head):
            unit.set_reshard_after_forward(False, recurse=False)  # gathered once: for head, loss and backward
        self._on_head = head.register_forward_pre_hook(self._swap)

    @torch.compiler.disable
    def end(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """After the forward, also where it failed: the head is as before, and the output has no logits."""
        if self._on_head is not None:
            self._on_head.remove()
            self._on_head = None
            for unit in _fsdp_units(model.get_output_embeddings()) if not torch.is_grad_enabled() else ():
                unit.reshard()  # no backward will do it
        if output is None or not isinstance(output.get("logits"), ChunkedLogits):
            return output
        return type(output)(**{name: value for name, value in output.items() if name != "logits"})

    def _swap(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[HeadInput]:
        return (HeadInput(args[0], self.chunk),)

    def __deepcopy__(self, memo: dict) -> ChunkedLoss:
        """The hooks hold nothing between calls."""
        return self


def _fsdp_units(head: nn.Module) -> list[Any]:
    """The head, or what is inside it, where FSDP2 gathers it by itself (as Accelerate's wrapping policy has it)."""
    return [module for module in head.modules() if hasattr(module, "set_reshard_after_forward")]


def chunked_loss(model: nn.Module) -> ChunkedLoss | None:
    """The hooks of a model whose loss is computed in chunks, if it is one."""
    owners = (getattr(hook, "__self__", None) for m in model.modules() for hook in m._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, ChunkedLoss)), None)


class _StandIn:
    """Not a tensor: what is not defined for it is refused by its name. `hasattr` stays a question."""

    def __getattr__(self, name: str) -> Any:
        raise _TouchedError(f"`{name}`")

    def _refuse(self, other: Any) -> Any:
        raise _TouchedError("arithmetic, comparisons or `[...]`")

    __getitem__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __pow__ = __matmul__ = __rmatmul__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        stand_in = next(x for x in args if isinstance(x, _StandIn))
        return stand_in.call(func, args, kwargs or {})

    def call(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        raise _TouchedError(f"`{getattr(func, '__name__', func)}`")


class _TouchedError(UspModelError, AttributeError):
    """A model does with its logits what cannot be done in chunks."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"loss_chunk with a model that computes {what} of its logits or of the input of its vocabulary head",
            rule="a loss in chunks follows one linear head; logits may be scaled by numbers, cast and squashed (tanh)",
            remedy="leave out loss_chunk for this model (an adapter on the head counts as a second head)",
        )


class HeadInput(_StandIn):
    """Hidden states on their way into the head."""

    def __init__(self, hidden: Tensor, chunk: int) -> None:
        self.hidden, self.chunk = hidden, chunk

    def call(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func is not functional.linear or args[0] is not self or not _is_plain(args[1]):
            return super().call(func, args, kwargs)
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        return ChunkedLogits(self, args[1], bias, ())


def _is_plain(weight: Any) -> bool:
    return type(weight) in (Tensor, nn.Parameter) and weight.ndim == 2


class ChunkedLogits(_StandIn):
    """Logits that exist only chunk by chunk: a linear head and what the model did to its output."""

    def __init__(
        self, source: HeadInput, weight_VD: Tensor, bias_V: Tensor | None, changes: tuple[Change, ...]
    ) -> None:
        self.source, self.weight_VD, self.bias_V, self.changes = source, weight_VD, bias_V, changes
        self.device = source.hidden.device

    def then(self, change: Change) -> ChunkedLogits:
        return ChunkedLogits(self.source, self.weight_VD, self.bias_V, (*self.changes, change))

    def float(self) -> ChunkedLogits:
        return self.then(Tensor.float)

    def to(self, target: Any) -> ChunkedLogits:
        if isinstance(target, torch.dtype):
            return self.then(lambda x: x.to(target))
        return self if torch.device(target) == self.device else super().__getattr__("to")

    def view(self, tokens: int, vocabulary: int) -> ChunkedLogits:
        """Rows and tokens flattened, as the loss does."""
        if tokens != -1 or vocabulary != len(self.weight_VD):
            raise _TouchedError(f"`view({tokens}, {vocabulary})` for a head of {len(self.weight_VD)} entries")
        return self

    def __mul__(self, factor: Any) -> ChunkedLogits:
        number = _number(factor)
        return self.then(lambda x: x * number)

    __rmul__ = __mul__  # type: ignore[assignment]

    def __truediv__(self, divisor: Any) -> ChunkedLogits:
        number = _number(divisor)
        return self.then(lambda x: x / number)

    def call(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func is torch.tanh:
            return self.then(torch.tanh)
        if func is not functional.cross_entropy or args[0] is not self or kwargs.get("weight") is not None:
            return super().call(func, args, kwargs)
        ignored, labels_T = kwargs["ignore_index"], args[1]
        hidden_TD = self.source.hidden.flatten(0, -2)
        head = Head(self.changes, self.source.chunk, ignored, kwargs["label_smoothing"], _autocast(hidden_TD))
        total = _SumOfLosses.apply(hidden_TD, self.weight_VD, self.bias_V, labels_T, head)
        return total if kwargs["reduction"] == "sum" else total / (labels_T != ignored).sum()


def _number(value: Any) -> Any:
    if isinstance(value, int | float):
        return value
    raise _TouchedError("a product or quotient with something else than a number")


def _autocast(tensor: Tensor) -> torch.dtype | None:
    """The dtype of matrix products if autocast is on."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class Head:
    """From a chunk of hidden states to the sum of its token losses."""

    def __init__(
        self, changes: tuple[Change, ...], chunk: int, ignored: int, smoothing: float, autocast: torch.dtype | None
    ) -> None:
        self.changes, self.chunk, self.ignored, self.smoothing = changes, chunk, ignored, smoothing
        self.autocast = autocast

    def cast(self, tensor: Tensor | None) -> Any:
        return tensor if tensor is None or self.autocast is None else tensor.to(self.autocast)

    def loss(self, logits_TV: Tensor, labels_T: Tensor) -> Tensor:
        for change in self.changes:
            logits_TV = change(logits_TV)
        return functional.cross_entropy(
            logits_TV, labels_T, ignore_index=self.ignored, reduction="sum", label_smoothing=self.smoothing
        )


class _SumOfLosses(torch.autograd.Function):
    """Sum of token losses []; forward and backward walk over the same chunks and hold one chunk of logits at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_T: Tensor, head: Head
    ) -> Tensor:
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, labels_T)
        ctx.head = head
        with _no_autocast(hidden_TD):
            weight_VD, bias_V = head.cast(weight_VD), head.cast(bias_V)
            chunks = zip(hidden_TD.split(head.chunk), labels_T.split(head.chunk), strict=True)
            losses = [head.loss(functional.linear(head.cast(h), weight_VD, bias_V), labels) for h, labels in chunks]
            return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, bias_V, labels_T = ctx.saved_tensors
        head, (wants_hidden, wants_weight, wants_bias, *_) = ctx.head, ctx.needs_input_grad
        d_hidden_TD = torch.empty_like(hidden_TD) if wants_hidden else None
        d_weight_VD = _zeros(weight_VD) if wants_weight else None
        d_bias_V = _zeros(bias_V) if wants_bias else None
        weight, bias = head.cast(weight_VD), head.cast(bias_V)
        for start in range(0, len(hidden_TD), head.chunk):
            chunk = slice(start, start + head.chunk)
            h_TD = head.cast(hidden_TD[chunk])
            with _no_autocast(hidden_TD), torch.enable_grad():
                logits_TV = functional.linear(h_TD.detach(), weight.detach(), bias).detach().requires_grad_()
                loss = head.loss(logits_TV, labels_T[chunk])
            (d_TV,) = torch.autograd.grad(loss, logits_TV, grads[0])
            if d_hidden_TD is not None:
                d_hidden_TD[chunk] = d_TV @ weight
            if d_weight_VD is not None:
                _add_product(d_weight_VD, d_TV.T, h_TD)
            if d_bias_V is not None:
                d_bias_V += d_TV.sum(0, dtype=d_bias_V.dtype)
        return d_hidden_TD, _back(d_weight_VD, weight_VD), _back(d_bias_V, bias_V), None, None


def _no_autocast(tensor: Tensor) -> Any:
    """Casts are made by hand, once for all chunks."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=accumulation_dtype(like.dtype))


def _back(total: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if total is None or like is None else total.to(like.dtype)


def _add_product(total_VD: Tensor, d_VT: Tensor, h_TD: Tensor) -> None:
    if d_VT.dtype == total_VD.dtype:
        total_VD.addmm_(d_VT, h_TD)
    else:
        total_VD += d_VT @ h_TD
