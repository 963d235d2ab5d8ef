"""One call of a decoder layer, on any part of its tokens: until it attends, or with attention's output given.

The layer's own code runs. Its further arguments are cut to the tokens at hand; the context that they carry says who
answers the layer's attention call (`hf_usp.batch.context.Interception`).

Shape suffixes: B rows, L local tokens of a row, l tokens at hand, X width of a hidden state, H query heads, G kv heads,
D key width, E value width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention.call import Inputs
from ..batch.context import ForwardContext, Interception
from ..batch.layout import MaskSpec, SequenceLayout
from ..batch.sharded_tensors import ContextMask, ShardedMask, make_handle
from ..kernels import Softmax

Stock = Callable[..., Any]
CARRIERS = (ShardedMask, ForwardContext, SequenceLayout)  # of the context
PASSED_ON = (Tensor, bool, int, float, str, type(None), torch.dtype, *CARRIERS)  # nothing that a layer could write into


class _Stopped(BaseException):
    """Ends a layer at its attention call; no `except Exception` of a model may catch it."""


class AttentionRequest(NamedTuple):
    """A layer's request to attention.

    Attributes:
        inputs: q_BlHD, k_BlGD, v_BlGE, sinks_H or None.
        mask_spec: the mask.
        softmax: scaling and softcap.
    """

    inputs: Inputs
    mask_spec: MaskSpec
    softmax: Softmax


class LayerCall:
    """A layer with the arguments of one call, the hidden states [B, L, X] left out.

    Attributes:
        layer: the layer.
        context: of the forward.
        batch: rows.
        length: local tokens of a row.
        returns_tuple: whether the layer's output is a tuple of one tensor; known once it has run.
    """

    def __init__(
        self,
        layer: nn.Module,
        stock: Stock,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        context: ForwardContext,
        hidden_BLX: Tensor,
    ) -> None:
        self.layer, self._stock, self._args, self._kwargs, self.context = layer, stock, args, kwargs, context
        self.batch, self.length = hidden_BLX.shape[:2]
        self.returns_tuple = False

    def before(self, hidden_BlX: Tensor, tokens: slice) -> AttentionRequest:
        """The layer's request to attention for some of its tokens."""
        requests: list[AttentionRequest] = []

        def stop(inputs: Any, mask_spec: MaskSpec, softmax: Softmax) -> Tensor:
            requests.append(AttentionRequest(tuple(inputs), mask_spec, softmax))
            raise _Stopped

        with suppress(_Stopped):
            self.run(hidden_BlX, tokens, stop)
        return requests[0]

    def after(self, hidden_BlX: Tensor, out_BlHE: Tensor, tokens: slice) -> Tensor:
        """The layer's output for some of its tokens, given attention's output for them."""
        output = self.run(hidden_BlX, tokens, lambda *_: out_BlHE)
        self.returns_tuple = isinstance(output, tuple)
        return output[0] if self.returns_tuple else output

    def run(self, hidden_BlX: Tensor, tokens: slice, answer: Callable[..., Tensor]) -> Any:
        """The layer's output for some of its tokens, its attention calls answered by `answer`."""
        context = self.context.intercepted(Interception(answer, tokens))
        handle = make_handle(context)
        args = [self._cut(value, tokens, context, handle) for value in self._args]
        kwargs = {name: self._cut(value, tokens, context, handle) for name, value in self._kwargs.items()}
        return self._stock(self.layer, hidden_BlX, *args, **kwargs)

    def _cut(self, value: Any, tokens: slice, context: ForwardContext, handle: Tensor) -> Any:
        """An argument for some tokens, with another context. No function inside `run`: one that calls itself would keep
        what the answer holds until Python looks for cycles."""
        if isinstance(value, tuple):
            return tuple(self._cut(x, tokens, context, handle) for x in value)
        if isinstance(value, ShardedMask):
            return ShardedMask(handle, value.mask_spec)
        if isinstance(value, CARRIERS):
            return context
        if not self.is_by_token(value):
            return value
        part = value[:, tokens]
        return ContextMask.of(part.as_subclass(Tensor), handle) if isinstance(value, ContextMask) else part

    def is_by_token(self, value: Any) -> bool:
        """Whether an argument has an entry for each token, [B, L, ...] or [1, L, ...]; the trial finds out if not."""
        shaped = isinstance(value, Tensor) and value.ndim >= 2
        return shaped and value.shape[1] == self.length and value.shape[0] in (1, self.batch)

    def arguments(self) -> Iterator[tuple[str, Any]]:
        """Name and value of each argument, those in tuples one by one."""

        def inside(name: str, value: Any) -> Iterator[tuple[str, Any]]:
            if type(value) is tuple:
                for i, x in enumerate(value):
                    yield from inside(f"{name}.{i}", x)
            else:
                yield name, value

        for name, value in (*enumerate(self._args, 1), *self._kwargs.items()):
            yield from inside(str(name), value)

    def signature(self) -> tuple[Any, ...]:
        """The calls that a trial holds for: modes, and what is cut of the arguments."""
        cut = tuple((name, type(value), self.is_by_token(value)) for name, value in self.arguments())
        return self.layer.training, torch.is_grad_enabled(), cut
