"""A ring's messages, and their memory: on a GPU used again by all stages, and by all layers of a batch that are alike.

torch tells its allocator that NCCL's stream uses what is sent and received (`record_stream`). Such memory, once freed,
is given out again only when the host has seen the device pass it. The host is many stages ahead, so every message would
take new memory. Buffers that are never freed need no such word:

- NCCL's stream waits, when a message is posted, for all that the current stream was given before;
- `P2PHandle.wait` makes the current stream wait for the message.

So a buffer may be given back once its message was waited for and all that reads it was launched. It is then taken again
on the same stream only. Whoever owns the buffers (a `RingCall`, thus the layout of a batch) frees them all at its end.

On the CPU nothing runs behind the host: every message has memory of its own size, freed when it is no longer needed.

Shape suffixes: T own tokens of the ring shard, K key rows of a message, G kv heads, D key width, E value width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable

import torch
from torch import Tensor

from ..batch.device_schedule import DeviceSchedule, Index, take


def current_stream(device: torch.device) -> Hashable | None:
    """The stream that gets what is launched now; None on the CPU, where nothing runs behind the host."""
    return None if device.type == "cpu" else torch.accelerator.current_stream(device)


class MessageBuffers:
    """Buffers for messages of up to `rows` rows, all of one width and dtype."""

    def __init__(self, rows: int) -> None:
        self._rows, self._free = rows, defaultdict[Hashable, list[Tensor]](list)

    def ahead(self, device: torch.device) -> int:
        """Steps whose messages are under way during the tiles of another.

        Two on a GPU: what is posted just before a tile may get no place on the device until that tile ends.
        """
        return 1 if current_stream(device) is None else 2

    def take(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """A message [rows, columns], contiguous, of any values, in the dtype and on the device of `like`."""
        free = self._free_for(like)
        if free is None or not rows:
            return like.new_empty(rows, columns)
        return (free.pop() if free else like.new_empty(self._rows, columns))[:rows]

    def give(self, message: Tensor) -> None:
        """Take a message back. It was waited for, and all that reads it was launched."""
        free, columns = self._free_for(message), message.shape[1]
        if free is not None and len(message):
            free.append(message.as_strided((self._rows, columns), (columns, 1), 0))

    def _free_for(self, tensor: Tensor) -> list[Tensor] | None:
        """Those of the current stream; None where buffers are not used again. torch keeps inference tensors apart."""
        stream = current_stream(tensor.device)
        return None if stream is None else self._free[stream, tensor.is_inference()]


class OwnRows:
    """Own keys and values as messages, a key beside its value. Most are slices of one, which is packed once."""

    def __init__(self, k_TGD: Tensor, v_TGE: Tensor, work: DeviceSchedule, buffers: MessageBuffers) -> None:
        self.k, self.v, self._buffers = k_TGD, v_TGE, buffers
        spans = [self._span(stage.send) for stage in work.stages[1:]]
        self._longest = max(spans, key=lambda span: span[1] - span[0], default=(0, 0))
        self._left = sum(self._is_shared(span) for span in spans)
        self._packed: Tensor | None = None

    def message(self, send: Index) -> Tensor:
        """These rows, packed."""
        start, stop = self._span(send)
        if not self._is_shared((start, stop)):
            return self._pack(send)
        first, last = self._longest
        if self._packed is None:
            self._packed = self._pack(slice(first, last))
        return self._packed[start - first : stop - first]

    def sent(self, send: Index, message: Tensor) -> None:
        """A message of these rows was waited for."""
        if not self._is_shared(self._span(send)):
            self._buffers.give(message)
            return
        self._left -= 1
        if not self._left and self._packed is not None:
            self._buffers.give(self._packed)
            self._packed = None

    def _span(self, send: Index) -> tuple[int, int]:
        return send.indices(len(self.k))[:2] if isinstance(send, slice) else (0, 0)

    def _is_shared(self, span: tuple[int, int]) -> bool:
        return self._longest[0] <= span[0] < span[1] <= self._longest[1]

    def _pack(self, rows: Index) -> Tensor:
        k, v = take(self.k, rows).flatten(1), take(self.v, rows).flatten(1)
        message = self._buffers.take(len(k), k.shape[1] + v.shape[1], k)
        return torch.cat([k, v], dim=1, out=message)


def unpack(packed: Tensor, k_TGD: Tensor, v_TGE: Tensor) -> tuple[Tensor, Tensor]:
    """Views on the keys and values in a packed message, with the widths of `k_TGD` and `v_TGE`."""
    number, (_, heads, width), (_, _, value_width) = packed.shape[0], k_TGD.shape, v_TGE.shape
    k, v = packed.split_with_sizes([heads * width, heads * value_width], dim=1)
    return k.view(number, heads, width), v.view(number, heads, value_width)
