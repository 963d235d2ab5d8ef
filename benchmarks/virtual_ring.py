"""All ranks of a ring in one process, one after another, on the code of real ranks: what do tiles and merges cost?

Only the exchange is replaced: messages go into a mailbox and are copied out of it, so nothing waits for a network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import hf_usp
from hf_usp.attention import ring
from hf_usp.batch.device_schedule import head_runs
from hf_usp.batch.layout import MaskSpec, make_layout
from hf_usp.kernels import KERNELS, Softmax
from hf_usp.sharding.masks import Documents


class _Arrived:
    """Nothing to wait for. Like a real handle it keeps what was sent until then."""

    def __init__(self, sent: list[Tensor]) -> None:
        self._sent = sent

    def wait(self) -> None:
        self._sent = []


class Mailbox:
    """Messages of every virtual rank to every other, in order. `keep`: messages are kept (not while timing)."""

    def __init__(self) -> None:
        self.rank, self.way, self.keep = 0, "", True
        self._messages: dict[tuple[str, int, int, int], Tensor] = {}
        self._counts: Counter[tuple[int, int]] = Counter()

    def begin(self, way: str, rank: int) -> None:
        """The next messages are those of this rank, from its first on; `way` is forward or backward."""
        self.way, self.rank = way, rank
        self._counts.clear()

    def post(self, group: Any, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> _Arrived:
        """In place of `hf_usp.distributed.comm.post`."""
        for tensor, reader in sends:
            if tensor.numel() and self.keep:
                self._messages[self._next(self.rank, reader)] = tensor.clone()
        for tensor, source in receives:
            if tensor.numel():
                message = self._messages.get(self._next(source, self.rank))
                tensor.zero_() if message is None else tensor.copy_(message)
        return _Arrived([tensor for tensor, _ in sends])

    def _next(self, source: int, reader: int) -> tuple[str, int, int, int]:
        # Both ends count alike: between two ranks messages arrive in the order in which they were sent.
        self._counts[source, reader] += 1
        return self.way, source, reader, self._counts[source, reader]

    def replacing(self) -> AbstractContextManager[Any]:
        """The block in which rings use this mailbox."""
        return patch.object(ring, "start_p2p", self.post)


class VirtualRing:
    """`degree` ranks over one sequence with documents between `edges`; `tensors` = q, k, v, dout [S, heads, D]."""

    def __init__(self, edges: Sequence[int], degree: int, tensors: Sequence[Tensor], kernel: str) -> None:
        self.mailbox = Mailbox()
        self.calls, self.rows, self.parts = [], [], []
        q, k = tensors[:2]
        heads = head_runs([(0, q.shape[1], 0, k.shape[1])])
        for rank in range(degree):
            group: Any = object() if degree > 1 else None  # the mailbox takes none
            mesh = hf_usp.UspMesh(degree, 1, rank, 0, tuple(range(degree)), group, None, None)
            layout = make_layout(Documents.from_bounds(edges), 1, edges[-1], mesh)
            assert layout.padded == layout.length, "the length is a multiple of 2 R"
            work = layout.device_schedule(MaskSpec(), q.device)
            self.calls.append(ring.RingCall(work, mesh, KERNELS[kernel], Softmax(q.shape[2] ** -0.5), heads))
            self.rows.append(torch.from_numpy(layout.shards[rank]).to(q.device))
            self.parts.append([t[self.rows[rank]] for t in tensors])
        self.kept: list[Sequence[Tensor]] = [()] * degree
        self.grads: list[Sequence[Tensor]] = [()] * degree

    def forward(self) -> None:
        """Every rank's forward, one after another."""
        for rank, (q, k, v, _) in enumerate(self.parts):
            self.mailbox.begin("forward", rank)
            self.kept[rank] = ring.ring_forward(q, k, v, None, self.calls[rank])

    def backward(self) -> None:
        """Every rank's backward, one after another."""
        for rank, (q, k, v, dout) in enumerate(self.parts):
            self.mailbox.begin("backward", rank)
            out, lse = self.kept[rank]
            self.grads[rank] = ring.ring_backward(dout, q, k, v, None, out, lse, self.calls[rank])[:3]

    def settle(self) -> list[Tensor]:
        """Run until every message is the right one; returns out, dq, dk, dv in the order of the sequence."""
        for step in (self.forward, self.forward):  # keys are sent, then read
            step()
        for _ in range(3):  # keys are sent, then partial gradients made of them, then read
            self.backward()
        self.mailbox.keep = False
        back = torch.cat(self.rows).argsort()
        parts = [[kept[0] for kept in self.kept], *([grads[i] for grads in self.grads] for i in range(3))]
        return [torch.cat(part)[back] for part in parts]
