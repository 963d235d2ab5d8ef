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

from ..batch.device_schedule import NONE, DeviceSchedule, Index


def current_stream(device: torch.device) -> Hashable | None:
    """The stream that gets what is launched now; None on the CPU, where nothing runs behind the host."""
    return None if device.type == "cpu" else torch.accelerator.current_stream(device)


class MessageBuffers:
    """Buffers for the messages of a schedule, all of one width and dtype, and what they are packed from.

    Attributes:
        ahead: steps whose messages are under way during the tiles of another. Two on a GPU: what is posted just before
            a tile may get no place on the device until that tile ends.
        shared: the longest slice of own rows that is sent; it is packed once, and slices inside it are views.
        places: of each step's rows, where in the packed slice they lie; None: they are packed alone.
    """

    def __init__(self, work: DeviceSchedule) -> None:
        self._rows, self.ahead = max(max(stage.num_sent, stage.num_received) for stage in work.stages), 1
        self._all = defaultdict[Hashable, list[Tensor]](list)
        self._free: list[Tensor] | None = None
        sent = (stage.send if stage.num_sent and isinstance(stage.send, slice) else NONE for stage in work.stages)
        spans = [span.indices(work.num_rows)[:2] for span in sent]
        start, stop = max(spans[1:], key=lambda span: span[1] - span[0], default=(0, 0))
        self.shared = slice(start, stop)
        self.places = [slice(a - start, b - start) if start <= a < b <= stop else None for a, b in spans]

    def begin(self, like: Tensor) -> None:
        """The next messages are on the device of `like` and its current stream. torch keeps inference tensors apart."""
        stream = current_stream(like.device)
        self.ahead = 1 if stream is None else 2
        self._free = None if stream is None else self._all[stream, torch.is_inference_mode_enabled()]

    def take(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """A message [rows, columns], contiguous, of any values, in the dtype and on the device of `like`."""
        if self._free is None or not rows:
            return like.new_empty(rows, columns)
        return (self._free.pop() if self._free else like.new_empty(self._rows, columns))[:rows]

    def give(self, *messages: Tensor) -> None:
        """Take messages back. They were waited for, and all that reads them was launched."""
        if self._free is not None:
            sizes = ((x, (self._rows, x.shape[1])) for x in messages if len(x))
            self._free += [x.as_strided(size, (size[1], 1), 0) for x, size in sizes]


class OwnRows:
    """Own keys and values as messages, a key beside its value. Most are views of one, which is packed once."""

    def __init__(self, k_TGD: Tensor, v_TGE: Tensor, buffers: MessageBuffers) -> None:
        self.k, self.v, self._buffers = k_TGD, v_TGE, buffers
        self._left = len(buffers.places) - buffers.places.count(None)
        self._packed: Tensor | None = None

    def message(self, step: int, rows: Index) -> Tensor:
        """These rows, which a step sends, packed."""
        place = self._buffers.places[step]
        if place is None:
            return self._pack(rows)
        if self._packed is None:
            self._packed = self._pack(self._buffers.shared)
        return self._packed[place]

    def sent(self, step: int, message: Tensor) -> None:
        """A step's message was waited for."""
        if self._buffers.places[step] is None:
            self._buffers.give(message)
            return
        self._left -= 1
        if not self._left and self._packed is not None:
            self._buffers.give(self._packed)
            self._packed = None

    def _pack(self, rows: Index) -> Tensor:
        k, v = self.k[rows].flatten(1), self.v[rows].flatten(1)
        message = self._buffers.take(len(k), k.shape[1] + v.shape[1], k)
        return torch.cat([k, v], dim=1, out=message)


def unpack(packed: Tensor, k_TGD: Tensor, v_TGE: Tensor) -> tuple[Tensor, Tensor]:
    """Views on the keys and values in a packed message, with the widths of `k_TGD` and `v_TGE`."""
    number, (_, heads, width), (_, _, value_width) = packed.shape[0], k_TGD.shape, v_TGE.shape
    k, v = packed.split_with_sizes([heads * width, heads * value_width], dim=1)
    return k.view(number, heads, width), v.view(number, heads, value_width)
