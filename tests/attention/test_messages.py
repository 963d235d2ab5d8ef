"""Message buffers used again, as on a GPU, rehearsed on the CPU with one stand-in stream: how many, in which order, and
that nothing touches one whose message is under way. Results are those without.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hf_usp
from hf_usp.attention import messages, ring

from ..ranks import Ranks

LAYERS = 3


def reach(tensor: Tensor) -> tuple[int, int]:
    """First and last byte that a contiguous message takes; of others a little more than they take."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + last * tensor.element_size()


class Watch(TorchDispatchMode):
    """Sees every message and every operator; refuses what a GPU would do at the same time as a message that it touches.

    On a GPU a message begins when what was launched before is done, and what is launched later waits for it only after
    `wait`. So between posting and `wait` nothing may be launched that writes what is sent, or touches what is received.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sending: list[tuple[int, int]] = []
        self.receiving: list[tuple[int, int]] = []
        self.kept: list[Tensor] = []  # so that no memory has the place of another message's
        self.packed = 0

    @property
    def buffers(self) -> int:
        return len({tensor.untyped_storage().data_ptr() for tensor in self.kept})

    def post(self, stock: Any) -> Any:
        def posted(group: Any, sends: Sequence[Any], receives: Sequence[Any]) -> Any:
            sent, received = ([x for x, _ in of if x.numel()] for of in (sends, receives))
            self.check(received, sent)
            pending = stock(group, sends, receives)
            spans = [reach(x) for x in sent], [reach(x) for x in received]
            self.sending += spans[0]
            self.receiving += spans[1]
            self.kept += [*sent, *received]
            wait = pending.wait

            def waited() -> None:
                wait()
                for under_way, of in zip((self.sending, self.receiving), spans, strict=True):
                    for span in of:
                        under_way.remove(span)

            pending.wait = waited
            return pending

        return posted

    def check(self, written: list[Tensor], read: list[Tensor]) -> None:
        for tensors, under_way in ((written, self.sending + self.receiving), (read, self.receiving)):
            for begin, end in map(reach, tensors):
                assert not any(begin < stop and start < end for start, stop in under_way), (
                    "a message is under way there"
                )

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, written = kwargs or {}, []
        for place, argument in enumerate(func._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write:
                written += [x for x in tree_leaves(value) if isinstance(x, Tensor) and x.numel()]
        self.check(written, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.numel()])
        self.packed += str(func) == "aten.cat.out"
        return func(*args, **kwargs)


@contextmanager
def watched(used_again: bool) -> Iterator[Watch]:
    watch = Watch()
    with ExitStack() as patches:
        if used_again:
            patches.enter_context(patch.object(messages, "current_stream", lambda device: "the only one"))
        patches.enter_context(patch.object(ring, "start_p2p", watch.post(ring.start_p2p)))
        patches.enter_context(watch)
        yield watch
    assert not watch.sending and not watch.receiving, "every message is waited for"


CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"sliding_window": 20},
    "packed": {"documents": (30, 3, 50, 13)},
    "balanced": {"documents": (30, 3, 50, 13), "order": "balanced"},
    "not causal": {"causal": False},
}


def layers(case: str, degrees: tuple[int, int], used_again: bool) -> tuple[list[Tensor], int, int]:
    """Outputs and gradients of some layers on this rank, how many buffers their messages took, and were packed."""
    options = dict(CASES[case])
    documents, order = options.pop("documents", (96,)), options.pop("order", "auto")
    mesh = hf_usp.UspMesh.build(ring_degree=degrees[0], ulysses_degree=degrees[1])
    positions = torch.cat([torch.arange(n) for n in documents])[None]
    batch = {"input_ids": torch.zeros(1, 96, dtype=torch.long), "position_ids": positions}
    layout = hf_usp.shard(batch, mesh, order=order)["usp"]
    torch.manual_seed(mesh.rank)
    inputs = [
        [torch.randn(1, layout.local_length, n, width, requires_grad=True) for n, width in ((4, 8), (2, 8), (2, 16))]
        for _ in range(LAYERS)
    ]
    with watched(used_again) as watch:
        outs = [hf_usp.usp_attention(*of_layer, layout, **options) for of_layer in inputs]
        sum(out.square().sum() for out in outs).backward()
    results = [
        *(out.detach() for out in outs),
        *(x.grad for of_layer in inputs for x in of_layer if x.grad is not None),
    ]
    return results, watch.buffers, watch.packed


@pytest.mark.parametrize("degrees", [(4, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_buffers_are_used_again_and_change_nothing(four_ranks: Ranks, case: str, degrees: tuple[int, int]) -> None:
    fresh, again = (four_ranks.run(layers, case, degrees, used_again) for used_again in (False, True))
    for (expected, before, _), (found, after, packed) in zip(fresh, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True)) and len(found) == 4 * LAYERS
        # Own rows, what three steps receive, gradients arriving, and those of one more step where tiles are several.
        assert after <= 6, (case, after)
        if case == "causal":
            assert (before, packed) == CAUSAL[degrees][:2] and after <= CAUSAL[degrees][2], (before, packed, after)


# Of three layers: buffers where each message has its own; how often rows are packed; buffers that are used again.
CAUSAL = {(4, 1): (33, 6, 5), (2, 2): (15, 6, 3)}


def one_for_all() -> None:
    buffers: list[Tensor] = []

    def take(self: Any, rows: int, columns: int, like: Tensor) -> Tensor:
        if not buffers:
            buffers.append(like.new_zeros(96, columns))
        return buffers[0][:rows]

    with patch.object(messages.MessageBuffers, "take", take), pytest.raises(AssertionError, match="is under way there"):
        layers("causal", (4, 1), True)


def test_one_buffer_for_all_is_seen(four_ranks: Ranks) -> None:
    four_ranks.run(one_for_all)
    four_ranks.stop()  # messages of what was refused are still under way; the next test starts other processes
