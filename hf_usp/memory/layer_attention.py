"""The attention of one decoder layer in groups of heads; queries, keys and values by the layer's own code, in chunks.

Shape suffixes: B rows, L local tokens of a row, l tokens of a chunk, X width of a hidden state, H query heads, G kv
heads, h, g those of a group, D key width, E value width, T tokens of the ring shard.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.call import AttentionCall, Inputs, backward, begin, forward, make_call
from ..attention.ulysses import (
    gather_heads_scatter_seq,
    gather_heads_scatter_seq_backward,
    gather_seq_scatter_heads,
)
from ..batch.context import AttentionShape
from ..kernels import accumulation_dtype
from ..sharding.heads import HeadShare, group_heads
from .layer_call import AttentionRequest, LayerCall
from .offloader import ActivationOffloader
from .tiled_mlp import Autocast


@dataclass(frozen=True)
class Sizes:
    """How layers are cut.

    Attributes:
        chunk: tokens of a chunk.
        groups: groups of heads.
        unshared: the references of gradients that nobody else has.
        kept: layers that keep attention's output and log-sum-exp.
    """

    chunk: int
    groups: int
    unshared: Container[tuple[int, ...]]
    kept: int = 0

    def chunks(self, length: int) -> list[slice]:
        """The chunks of so many tokens."""
        return [slice(start, min(start + self.chunk, length)) for start in range(0, length, self.chunk)]


class LayerAttention:
    """Attention of one layer over all its tokens, in groups of heads.

    `x_BLX` may be in the host memory of an offloader: chunks of it are brought to the device.
    """

    def __init__(
        self,
        call: LayerCall,
        x_BLX: Tensor,
        device: torch.device,
        sizes: Sizes,
        autocast: Autocast,
        offloader: ActivationOffloader | None,
    ) -> None:
        self.call, self.x_BLX, self.device, self.autocast, self.offloader = call, x_BLX, device, autocast, offloader
        self.chunks = sizes.chunks(call.length)
        [x_BlX] = next(self._on_device([[x_BLX[:, self.chunks[0]]]]))
        first = self._request(x_BlX, self.chunks[0])
        self.mask_spec, self.softmax, (q, k, v, self.sinks_H) = first.mask_spec, first.softmax, first.inputs
        self.dtype, self.widths = q.dtype, (q.shape[3], k.shape[3], v.shape[3])
        self.heads, self.kv_heads = q.shape[2], k.shape[2]
        self.groups = group_heads(self.heads, self.kv_heads, sizes.groups, call.context.layout.mesh.ulysses_degree)

    def parts(self, *others_BLX: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
        """Each chunk of tokens, with its part of the layer's input and of other tensors; on the device.

        They may be read until the next chunk but one is asked for.
        """
        requests = [[x_BLX[:, tokens] for x_BLX in (self.x_BLX, *others_BLX)] for tokens in self.chunks]
        return zip(self.chunks, self._on_device(requests), strict=True)

    def _on_device(self, requests: list[list[Tensor]]) -> Iterator[list[Tensor]]:
        return iter(requests) if self.offloader is None else self.offloader.parts(requests, self.device)

    def before(self, x_BlX: Tensor, tokens: slice) -> AttentionRequest:
        """The layer's request to attention, in the autocast of the forward."""
        with self.autocast():
            return self.call.before(x_BlX, tokens)

    def after(self, x_BlX: Tensor, out_BlHE: Tensor, tokens: slice) -> Tensor:
        """The layer's output, given attention's, in the autocast of the forward."""
        with self.autocast():
            return self.call.after(x_BlX, out_BlHE, tokens)

    def _request(self, x_BlX: Tensor, tokens: slice) -> AttentionRequest:
        with torch.no_grad():
            return self.before(x_BlX, tokens)

    def inputs(self, group: HeadShare) -> Inputs:
        """q_BLhD, k_BLgD, v_BLgE and sinks_h of a group."""
        spans = ((group.q0, group.q1), (group.k0, group.k1), (group.k0, group.k1))
        shape = (self.call.batch, self.call.length)
        buffers = [
            torch.empty(*shape, b - a, width, dtype=self.dtype, device=self.device)
            for (a, b), width in zip(spans, self.widths, strict=True)
        ]
        for tokens, (x_BlX,) in self.parts():
            found = self._request(x_BlX, tokens).inputs
            for buffer, x, (a, b) in zip(buffers, found, spans, strict=False):
                buffer[:, tokens] = x[:, :, a:b]  # type: ignore[index]
        sinks_h = None if self.sinks_H is None else self.sinks_H[group.q0 : group.q1]
        return buffers[0], buffers[1], buffers[2], sinks_h

    def bytes_kept(self) -> list[int]:
        """Of out_BLhE and of the log-sum-exp of each group."""
        found, tokens = [], self.call.batch * self.call.length
        for group in self.groups:
            heads = self._core(group).heads
            found.append(tokens * group.num_query * self.widths[2] * self.dtype.itemsize)
            lse = tokens * heads.mesh.ulysses_degree * heads.mine.num_query
            found.append(lse * accumulation_dtype(self.dtype).itemsize)
        return found

    def forward(self, done: Callable[[Tensor], None] = lambda _: None) -> tuple[list[Tensor], list[Tensor]]:
        """out_BLhE and the log-sum-exp of each group; `done` is called for each of them at once."""
        outs, lses = list[Tensor](), list[Tensor]()
        for group in self.groups:
            inputs = self.inputs(group)
            core = begin(inputs, self.call.context, self.mask_spec, self.softmax)
            arrived, out_ThE, lse = forward(inputs, core)
            del inputs, arrived
            outs.append(gather_heads_scatter_seq(out_ThE, core.heads))
            del out_ThE
            lses.append(lse)
            done(outs[-1])
            done(lse)
            del lse
        return outs, lses

    def backward(self, outs: list[Tensor], lses: list[Tensor], douts: list[Tensor]) -> list[Inputs]:
        """dq_BLhD, dk_BLgD, dv_BLgE and dsinks_h of each group. Tensors of the device leave the lists."""
        found, kept = [], self._of_groups(outs, lses)
        for group in self.groups:
            core = self._core(group)
            saved = self._saved(group, core)
            out_BLhE, lse = next(kept)  # those of the next group come while this one is computed
            saved += [gather_heads_scatter_seq_backward(out_BLhE, core.heads), lse]
            del out_BLhE, lse
            dout_ThE = gather_heads_scatter_seq_backward(douts.pop(0), core.heads)
            *grads, dsinks = backward(dout_ThE, saved, core)
            del dout_ThE, saved
            dq, dk, dv = (_alone(grads.pop(0)) for _ in range(3))
            found.append((dq, dk, dv, dsinks))
            del dq, dk, dv
        return found

    def _of_groups(self, outs: list[Tensor], lses: list[Tensor]) -> Iterator[Sequence[Tensor]]:
        """out_BLhE and the log-sum-exp of each group, on the device."""
        if self.offloader is not None and self.offloader.is_on_host(outs[0]):
            return self._on_device([list(pair) for pair in zip(outs, lses, strict=True)])
        return ((outs.pop(0), lses.pop(0)) for _ in self.groups)

    def _saved(self, group: HeadShare, core: AttentionCall) -> list[Tensor | None]:
        """Inputs, and the heads that arrived instead of them, as attention's forward had them."""
        q, k, v, sinks = self.inputs(group)
        arrived = gather_seq_scatter_heads(q, k, v, core.heads)
        return [q, k, v, sinks, None] if arrived is None else [None, None, None, sinks, arrived]

    def _core(self, group: HeadShare) -> AttentionCall:
        """The call of the forward; not counted again."""
        widths = self.widths[0], self.widths[2]
        shape = AttentionShape(self.mask_spec, group.num_query, group.num_kv, *widths, self.dtype)
        return make_call(shape, self.device, self.call.context.layout, self.softmax)

    def joined(self, pieces: Sequence[Tensor], which: int, tokens: slice) -> Tensor:
        """Gradients of all heads for a chunk, from those of each group; kv heads that several read are summed."""
        spans = [(g.k0, g.k1) if which else (g.q0, g.q1) for g in self.groups]
        number = self.kv_heads if which else self.heads
        if sum(b - a for a, b in spans) == number:
            return torch.cat([piece[:, tokens] for piece in pieces], dim=2)
        part = pieces[0][:, tokens]
        total = part.new_zeros(*part.shape[:2], number, part.shape[3], dtype=accumulation_dtype(part.dtype))
        for piece, (a, b) in zip(pieces, spans, strict=True):
            total[:, :, a:b] += piece[:, tokens]
        return total.to(part.dtype)


def _alone(x: Tensor) -> Tensor:
    """The tensor without the rest of the memory that it is a part of."""
    return x.clone() if x.untyped_storage().nbytes() > x.nbytes else x
