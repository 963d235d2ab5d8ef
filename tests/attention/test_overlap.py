"""Transfers behind tiles, by a clock that counts work instead of seconds; and no layer waits for the device.

A message takes `latency` from the moment it is posted; a tile takes its area, in the backward 2.5 times. Whoever waits
for a message before that moves the clock. So what a rank waits, in latencies, is the number of exposed hops.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_usp.planner.hardware import MACHINES, Link
from hf_usp.planner.roofline import exposed_of, transfers
from hf_usp.planner.workload import Degrees

from ..ranks import Ranks

BACKWARD = 2.5


class Clock:
    def __init__(self, latency: float, blocking: bool) -> None:
        self.now, self.waited, self.latency, self.blocking = 0.0, 0.0, latency, blocking

    def until(self, moment: float) -> None:
        self.waited += max(0.0, moment - self.now)
        self.now = max(self.now, moment)


class Delayed:
    """A message under way that is there `latency` after it was posted."""

    def __init__(self, pending: Any, clock: Clock, empty: bool) -> None:
        self.pending, self.clock = pending, clock
        self.arrives = clock.now if empty else clock.now + clock.latency
        if clock.blocking:
            clock.until(self.arrives)

    def wait(self) -> None:
        self.pending.wait()
        self.clock.until(self.arrives)


class TimedKernel:
    """A kernel whose calls move the clock by their area."""

    def __init__(self, kernel: Any, clock: Clock) -> None:
        self.kernel, self.clock, self.name = kernel, clock, kernel.name

    def forward(self, q: Any, k: Any, v: Any, segments: Any, softmax: Any) -> Any:
        self.clock.now += area(segments)
        return self.kernel.forward(q, k, v, segments, softmax)

    def backward(self, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, segments: Any, softmax: Any) -> Any:
        self.clock.now += BACKWARD * area(segments)
        return self.kernel.backward(dout, q, k, v, out, lse, segments, softmax)


def area(segments: Any) -> float:
    assert segments.window_size_left == -1, "whole rectangles and causal squares"
    edges = zip(segments.q_offsets, segments.q_offsets[1:], segments.k_offsets, segments.k_offsets[1:], strict=False)
    return sum((q1 - q0) * (k1 - k0) * (0.5 if segments.window_size_right == 0 else 1.0) for q0, q1, k0, k1 in edges)


def exposed_hops(blocking: bool) -> tuple[float, float]:
    """Hops of this rank that are waited for, forward and backward, on a causal zigzag ring of four."""
    import hf_usp
    from hf_usp.attention import call as core
    from hf_usp.attention import ring

    mesh = hf_usp.UspMesh.build(ring_degree=4, ulysses_degree=1)
    layout = hf_usp.shard({"input_ids": torch.zeros(1, 256, dtype=torch.long)}, mesh)["usp"]
    assert layout.order == "zigzag"
    q, k, v = (torch.randn(1, layout.local_length, 2, 8, requires_grad=True) for _ in range(3))
    # A little less than the smallest stage: a transfer fits behind one stage, and behind nothing less.
    latency = 0.95 * layout.local_length**2 / 2
    clock = Clock(latency, blocking)
    post, choose = ring.start_p2p, core.choose_kernel

    def delayed(group: Any, sends: Any, receives: Any) -> Delayed:
        return Delayed(post(group, sends, receives), clock, not any(x.numel() for x, _ in receives))

    with (
        patch.object(ring, "start_p2p", delayed),
        patch.object(core, "choose_kernel", lambda *args: TimedKernel(choose(*args), clock)),
    ):
        out = hf_usp.usp_attention(q, k, v, layout)
        forward, clock.waited, clock.latency = clock.waited / clock.latency, 0.0, BACKWARD * latency
        out.sum().backward()
    return forward, clock.waited / clock.latency


def test_no_hop_is_exposed_forward_and_one_backward(four_ranks: Ranks) -> None:
    for forward, backward in four_ranks.run(exposed_hops, False):
        assert forward == 0.0
        assert 0.0 < backward <= 1.0, "the last dK and dV come home after the last tile"


def test_the_clock_sees_hops_that_block(four_ranks: Ranks) -> None:
    """The same calls with messages that are waited for where they are posted: every hop shows."""
    for forward, backward in four_ranks.run(exposed_hops, True):
        assert forward == pytest.approx(3.0) and backward == pytest.approx(6.0)


class Waiting:
    """A message that finds no place on the device before the tile that is launched after it ends."""

    def __init__(self, pending: Any, clock: Clock) -> None:
        self.pending, self.clock, self.begun = pending, clock, float("inf")

    def wait(self) -> None:
        self.pending.wait()
        self.clock.until(min(self.begun, self.clock.now) + self.clock.latency)


class FullKernel(TimedKernel):
    """A kernel that takes the whole device: messages begin when a tile ends."""

    waiting: list[Waiting]

    def forward(self, *args: Any) -> Any:
        return self.ended(super().forward(*args))

    def backward(self, *args: Any) -> Any:
        return self.ended(super().backward(*args))

    def ended(self, result: Any) -> Any:
        for message in self.waiting:
            message.begun = min(message.begun, self.clock.now)
        return result


def exposed_behind_full_tiles(runs_behind: bool) -> tuple[float, float]:
    """Hops that this rank waits for, forward and backward, where a tile leaves no place for a message."""
    import hf_usp
    from hf_usp.attention import call as core
    from hf_usp.attention import messages, ring

    mesh = hf_usp.UspMesh.build(ring_degree=4, ulysses_degree=1)
    layout = hf_usp.shard({"input_ids": torch.zeros(1, 256, dtype=torch.long)}, mesh)["usp"]
    q, k, v = (torch.randn(1, layout.local_length, 2, 8, requires_grad=True) for _ in range(3))
    latency = 0.95 * layout.local_length**2 / 2
    clock, waiting = Clock(latency, False), list[Waiting]()
    post, choose = ring.start_p2p, core.choose_kernel

    def queued(group: Any, sends: Any, receives: Any) -> Waiting:
        waiting.append(Waiting(post(group, sends, receives), clock))
        return waiting[-1]

    def full(*args: Any) -> FullKernel:
        kernel = FullKernel(choose(*args), clock)
        kernel.waiting = waiting
        return kernel

    stream = "the only one" if runs_behind else None
    with (
        patch.object(ring, "start_p2p", queued),
        patch.object(core, "choose_kernel", full),
        patch.object(messages, "current_stream", lambda device: stream),
    ):
        out = hf_usp.usp_attention(q, k, v, layout)
        forward, clock.waited, clock.latency = clock.waited / clock.latency, 0.0, BACKWARD * latency
        out.sum().backward()
    return forward, clock.waited / clock.latency


def test_messages_two_steps_ahead_hide_behind_tiles_that_take_the_whole_device(four_ranks: Ranks) -> None:
    """One step ahead every message begins when it is needed; of keys and values two ahead only the first one does.

    Gradients are sent when they are there.
    """
    for found in four_ranks.run(exposed_behind_full_tiles, False):
        assert found == pytest.approx((3.0, 5.0))
    for found in four_ranks.run(exposed_behind_full_tiles, True):
        assert found == pytest.approx((1.0, 4.0))


# Latencies of messages between nodes and inside one, in stages: those between nodes are longer than what hides them.
ACROSS, INSIDE = 1.7, 0.6


def exposed_on_two_nodes() -> tuple[float, float]:
    """Stages that this rank waits, forward and backward, on a causal zigzag ring over two nodes of two ranks."""
    import hf_usp
    from hf_usp.attention import call as core
    from hf_usp.attention import ring

    with patch.dict(os.environ, LOCAL_WORLD_SIZE="2"):
        mesh = hf_usp.UspMesh.build(ring_degree=4, ulysses_degree=1)
    layout = hf_usp.shard({"input_ids": torch.zeros(1, 256, dtype=torch.long)}, mesh, order="zigzag")["usp"]
    q, k, v = (torch.randn(1, layout.local_length, 2, 8, requires_grad=True) for _ in range(3))
    stage = layout.local_length**2 / 2
    clock, busy = Clock(stage, False), [0.0]
    post, choose = ring.start_p2p, core.choose_kernel

    def queued(group: Any, sends: Any, receives: Any) -> Delayed:
        """Messages of a rank move one after the other."""
        it = Delayed(post(group, sends, receives), clock, False)
        across = any(peer // 2 != mesh.rank // 2 for _, peer in sends)
        it.arrives = busy[0] = max(busy[0], clock.now) + (ACROSS if across else INSIDE) * clock.latency
        return it

    with (
        patch.object(ring, "start_p2p", queued),
        patch.object(core, "choose_kernel", lambda *args: TimedKernel(choose(*args), clock)),
    ):
        out = hf_usp.usp_attention(q, k, v, layout)
        forward, clock.waited, clock.latency = clock.waited / stage, 0.0, BACKWARD * stage
        out.sum().backward()
    return forward, clock.waited / clock.latency


def test_what_the_roofline_says_is_exposed_is_what_the_loop_waits_for(four_ranks: Ranks) -> None:
    links = (Link(2, 1e30, latency=INSIDE), Link(4, 1e30, latency=ACROSS))
    hops = transfers(Degrees(1, 4), replace(MACHINES["cpu"], links=links), 1.0)
    stages = [1.0] * 4
    expected = exposed_of(stages, hops), exposed_of(stages, hops, hops)
    assert expected == pytest.approx((1.4, 4.0))
    for waited in four_ranks.run(exposed_on_two_nodes):
        assert waited == pytest.approx(expected)


class NoSync(TorchDispatchMode):
    """Refuses operators for which the host waits for the device, or that carry new integers to it, and collectives
    other than those that move tokens."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "equal", "is_nonzero", "_unique2")
    MOVES = ("alltoall_base_", "send", "recv_")

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        space, name = str(func).split(".")[:2]
        assert name not in self.FORBIDDEN, f"{func} inside a layer"
        if name in ("index", "index_put", "index_put_"):
            assert all(x is None or x.dtype != torch.bool for x in args[1]), f"{func} with a mask inside a layer"
        assert space != "c10d" or name in self.MOVES, f"{func} inside a layer"
        return func(*args, **(kwargs or {}))


def layers_without_sync(ring: int, ulysses: int) -> None:
    """Full, windowed, packed and balanced layers, after the first layer has made the plans."""
    import hf_usp

    mesh = hf_usp.UspMesh.build(ring_degree=ring, ulysses_degree=ulysses)
    packed = torch.cat([torch.arange(n) for n in (30, 3, 50, 13)])
    for order in ("zigzag", "balanced"):
        for positions in (torch.arange(96), packed):
            batch = {"input_ids": torch.zeros(1, 96, dtype=torch.long), "position_ids": positions[None]}
            layout = hf_usp.shard(batch, mesh, order=order)["usp"]
            q, k, v = (torch.randn(1, layout.local_length, 4, 8, requires_grad=True) for _ in range(3))
            sinks = torch.randn(4, requires_grad=True)
            for window in (None, 7):
                hf_usp.usp_attention(q, k, v, layout, sliding_window=window)
                with NoSync():
                    hf_usp.usp_attention(q, k, v, layout, sliding_window=window, sinks=sinks).sum().backward()


@pytest.mark.parametrize(("ring", "ulysses"), [(4, 1), (2, 2)])
def test_no_layer_waits_for_the_device_or_exchanges_metadata(four_ranks: Ranks, ring: int, ulysses: int) -> None:
    four_ranks.run(layers_without_sync, ring, ulysses)


def states_without_sync() -> None:
    """Recurrent layers that pass states, after the first has made the plan; a kernel of zeros waits for nothing."""
    import hf_usp
    from hf_usp.recurrent.state_passing import scan_by_states

    mesh = hf_usp.UspMesh.build(ring_degree=4, ulysses_degree=1)
    layout = hf_usp.shard({"input_ids": torch.zeros(1, 96, dtype=torch.long)}, mesh)["usp"]
    length = layout.local_length
    shapes = {"query": (2, 8), "key": (2, 8), "value": (4, 8), "g": (4,), "beta": (4,)}
    tensors = {name: torch.randn(1, length, *shape, requires_grad=True) for name, shape in shapes.items()}

    def kernel(taken: Any, state: Any, wanted: bool) -> Any:
        value = taken["value"]
        return value * 1.0, value.sum(1)[:, :, None].expand(-1, -1, 8, -1) if wanted else None

    scan_by_states(kernel, layout, tensors)
    with NoSync():
        scan_by_states(kernel, layout, tensors).sum().backward()


def test_no_recurrent_layer_waits_for_the_device(four_ranks: Ranks) -> None:
    four_ranks.run(states_without_sync)


def test_a_synchronisation_would_be_seen() -> None:
    with NoSync(), pytest.raises(AssertionError, match="inside a layer"):
        torch.ones(1).item()
    with NoSync(), pytest.raises(AssertionError, match="with a mask inside a layer"):
        torch.ones(2)[torch.ones(2) > 0]
