"""The loss of a vocabulary head in chunks of tokens: no rank ever holds all of its logits.

At 131,072 tokens and a vocabulary of 150,000 the logits alone are 73 GiB in fp32. Here the head's input is swapped for
a stand-in. `torch.nn.functional.linear` of it is a stand-in for the logits, which remembers what the model does to them
on the way to its loss (scaling, tanh of a softcap, casts), and `cross_entropy` of that does the work, chunk by chunk
(`token_losses.py`). The model and its loss function run unchanged; whatever else a model does with its logits is
refused by name.

Under ZeRO-3 weights are there only while their module is called, and `linear` is replaced, for every model of the
process, by a function that stand-ins do not reach. There the head's own forward makes the stand-in, and the loss is
computed within a second call of the head, so that DeepSpeed's hooks gather and reduce the weight as ever.

Under tensor parallelism each rank holds some rows of the head, and Transformers' forward of it gathers the logits.
There, too, the head's own forward makes the stand-in; of a chunk's logits each rank computes those of its rows.

Shape suffixes: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..compat import find_hook_owner, get_reshard_state, is_zero3_parameter, linear_is_replaced, set_reshard_state
from ..distributed.loss import VocabularyPart
from ..errors import UspModelError
from ..models.backbone import find_backbone
from ..models.pickling import NotSaved
from ..models.tensor_parallel import head_is_cut, rows_of_head
from ..utils.dtypes import autocast_dtype
from .linear_cross_entropy import ChunkedLinearCrossEntropy, LMHead, LogitTransform


class ChunkedLoss(NotSaved):
    """The hooks of one model whose loss is computed in chunks of `chunk` tokens whenever it gets labels.

    Its outputs then hold no `logits`. Raises `UspModelError` for a model without a vocabulary head, with another loss
    than Transformers' ForCausalLMLoss, or whose head tensor parallelism spreads otherwise than by entries of the
    vocabulary.
    """

    def __init__(self, model: PreTrainedModel, chunk: int) -> None:
        if not find_backbone(model).token_loss or model.get_output_embeddings() is None:
            name = getattr(model.loss_function, "__name__", type(model.loss_function).__name__)
            raise UspModelError(
                f"loss_chunk_size with {type(model).__name__} and the loss {name}",
                rule="a loss function that needs all logits at once cannot be computed in chunks; ForCausalLMLoss of a "
                "linear vocabulary head, a sum over tokens, can",
                remedy="use the model's ForCausalLM class with its own loss, or leave out loss_chunk_size",
            )
        self.chunk, self.over_tp = chunk, head_is_cut(model)
        self._on_head: RemovableHandle | _OwnForward | None = None
        self._reshards: list[tuple[Any, Any]] = []  # FSDP2 units of the head, and what they did after a forward
        self._handles = (
            model.register_forward_pre_hook(self.begin, with_kwargs=True),
            model.register_forward_hook(self.end, with_kwargs=True, always_call=True),
        )

    def remove(self) -> None:
        """Restore the model, FSDP2's reshard flag of its head included."""
        for handle in self._handles:
            handle.remove()
        for unit, before in self._reshards:
            set_reshard_state(unit, before)

    @torch.compiler.disable
    def begin(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before a forward with labels: the head will get a stand-in."""
        head = model.get_output_embeddings()
        if kwargs.get("labels") is None and kwargs.get("shift_labels") is None:
            if kwargs.get("num_items_in_batch") is not None:
                raise UspModelError(
                    "loss_chunk_size with a loss outside the model (compute_loss_func, label smoothing): a token count "
                    "came without labels",
                    rule="a loss function that needs all logits at once cannot be computed in chunks",
                    remedy="let the model compute its loss, or leave out loss_chunk_size",
                )
            return
        partitioned = any(is_zero3_parameter(p) for p in head.parameters())
        for unit in _fsdp_units(head):
            if all(known is not unit for known, _ in self._reshards):
                self._reshards.append((unit, get_reshard_state(unit)))
            unit.set_reshard_after_forward(False, recurse=False)  # gathered once: for head, loss and backward
        if self.over_tp:
            self._on_head = _OwnForward(head, partial(_own_logits, head, self.chunk, _rows_of_head))
            return
        if partitioned or linear_is_replaced():
            _check_plain(head)
            weights = _PartitionedHead if partitioned else _whole_head
            self._on_head = _OwnForward(head, partial(_own_logits, head, self.chunk, weights))
            return
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


def _check_plain(head: nn.Module) -> None:
    if type(head).forward is not nn.Linear.forward or "forward" in vars(head):
        raise UspModelError(
            f"loss_chunk_size with a vocabulary head of class {type(head).__name__} where DeepSpeed's ZeRO-3 has "
            "replaced torch.nn.functional.linear",
            rule="the loss in chunks is computed inside the forward of one linear head (torch.nn.Linear)",
            remedy="train the head without an adapter, use ZeRO-2 or FSDP2, or leave out loss_chunk_size",
        )


class _OwnForward:
    """The forward of one module, replaced until `remove`."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module, self.before = module, vars(module).get("forward")
        module.forward = forward

    def remove(self) -> None:
        if self.before is None:
            del self.module.forward
        else:
            self.module.forward = self.before


def _own_logits(head: nn.Linear, chunk: int, weights: Callable[[nn.Linear], Weights], hidden: Tensor) -> ChunkedLogits:
    return ChunkedLogits(HeadInput(hidden, chunk), weights(head), ())


def _whole_head(head: nn.Linear) -> _HeadWeights:
    return _HeadWeights(head.weight, head.bias)


def _rows_of_head(head: nn.Linear) -> _HeadWeights:
    return _HeadWeights(*rows_of_head(head))


def _fsdp_units(head: nn.Module) -> list[Any]:
    """The head, or what is inside it, where FSDP2 gathers it by itself (as Accelerate's wrapping policy has it)."""
    return [module for module in head.modules() if hasattr(module, "set_reshard_after_forward")]


def chunked_loss(model: nn.Module) -> ChunkedLoss | None:
    """The hooks of a model whose loss is computed in chunks, if it is one."""
    return find_hook_owner(model, ChunkedLoss)


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
            f"loss_chunk_size with a model that computes {what} of its logits or of the input of its vocabulary head",
            rule="a loss in chunks follows one linear head; logits may be scaled by numbers, cast and squashed (tanh)",
            remedy="leave out loss_chunk_size for this model (an adapter on the head counts as a second head)",
        )


class HeadInput(_StandIn):
    """Hidden states on their way into the head."""

    def __init__(self, hidden: Tensor, chunk: int) -> None:
        self.hidden, self.chunk = hidden, chunk

    def call(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func is not functional.linear or args[0] is not self or not _is_plain(args[1]):
            return super().call(func, args, kwargs)
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        return ChunkedLogits(self, _HeadWeights(args[1], bias), ())


def _is_plain(weight: Any) -> bool:
    return type(weight) in (Tensor, nn.Parameter) and weight.ndim == 2


class _HeadWeights:
    """A linear head whose weights stay where they are until the backward."""

    def __init__(self, weight_VD: Tensor, bias_V: Tensor | None, part: VocabularyPart | None = None) -> None:
        self.weight_VD, self.bias_V, self.part = weight_VD, bias_V, part
        self.entries = len(weight_VD) if part is None else part.entries

    def sum_of_losses(self, hidden_TD: Tensor, labels_T: Tensor, head: LMHead) -> Tensor:
        return ChunkedLinearCrossEntropy.apply(hidden_TD, self.weight_VD, self.bias_V, labels_T, head)


class _PartitionedHead:
    """A linear head whose weights are there only while it is called: the loss is the output of a call of its own.

    It holds no tensor: DeepSpeed looks for parameters in what a module returns, to keep them gathered.
    """

    def __init__(self, module: nn.Linear) -> None:
        self.module, self.entries, self.part = module, len(module.weight), None

    def sum_of_losses(self, hidden_TD: Tensor, labels_T: Tensor, head: LMHead) -> Tensor:
        def forward(hidden_TD: Tensor) -> Tensor:
            return ChunkedLinearCrossEntropy.apply(hidden_TD, self.module.weight, self.module.bias, labels_T, head)

        inside = _OwnForward(self.module, forward)
        try:
            return self.module(hidden_TD)
        finally:
            inside.remove()


Weights = _HeadWeights | _PartitionedHead


class ChunkedLogits(_StandIn):
    """Logits that exist only chunk by chunk: a linear head and what the model did to its output."""

    def __init__(self, source: HeadInput, head: Weights, changes: tuple[LogitTransform, ...]) -> None:
        self.source, self.head, self.changes = source, head, changes
        self.device = source.hidden.device

    def then(self, change: LogitTransform) -> ChunkedLogits:
        return ChunkedLogits(self.source, self.head, (*self.changes, change))

    def float(self) -> ChunkedLogits:
        return self.then(Tensor.float)

    def to(self, target: Any) -> ChunkedLogits:
        if isinstance(target, torch.dtype):
            return self.then(lambda x: x.to(target))
        return self if torch.device(target) == self.device else super().__getattr__("to")

    def view(self, tokens: int, vocabulary: int) -> ChunkedLogits:
        """Rows and tokens flattened, as the loss does."""
        if tokens != -1 or vocabulary != self.head.entries:
            raise _TouchedError(f"`view({tokens}, {vocabulary})` for a head of {self.head.entries} entries")
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
        head = LMHead(
            changes=self.changes,
            chunk=self.source.chunk,
            ignored=ignored,
            smoothing=kwargs["label_smoothing"],
            autocast=autocast_dtype(hidden_TD),
            part=self.head.part,
        )
        total = self.head.sum_of_losses(hidden_TD, labels_T, head)
        return total if kwargs["reduction"] == "sum" else total / (labels_T != ignored).sum()


def _number(value: Any) -> Any:
    if isinstance(value, int | float):
        return value
    raise _TouchedError("a product or quotient with something else than a number")
