"""Machines as a roofline sees them: rates of one rank, and links nested from the fastest to the slowest. No torch.

A *level* is a group of neighbouring ranks (a node, a PCIe switch) and the link that joins its parts: the level below,
or single ranks. Ranks are numbered so that neighbours share the lowest level they can, as launchers do.

Bandwidths are achieved ones, in bytes a second, one way. Peak rates and memory sizes are the vendors'. The other
figures are round ones, the same for all machines where nothing speaks against it: the ramps follow the published curves
of FlashAttention-2 (arXiv 2307.08691), the rest was chosen so that one set agrees with the order of the degrees in all
published tables (docs/roofline.md). Rates of attention are published ones, kernel by kernel, each with its source; a
kernel without one on a machine is refused there. They rank ways to run; they do not promise seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import UspConfigError


@dataclass(frozen=True)
class Link:
    """One level of the network.

    Attributes:
        ranks: ranks that it connects; its parts are the level below.
        bandwidth: bytes a second of one rank that alone talks to another part.
        shared: bytes a second of all ranks of one part together; None: every rank has a link of its own.
        latency: seconds until a message or collective has started, its launch included.
    """

    ranks: int
    bandwidth: float
    shared: float | None = None
    latency: float = 20e-6


@dataclass(frozen=True)
class Workspace:
    """Bytes that an attention kernel's backward takes beside its inputs and results.

    Attributes:
        query: bytes of an element of the queries: the gradient of the queries summed in fp32.
        key_value: bytes of an element of keys and values, where query heads share them.
        expanded: those of keys and values are counted for every query head.
    """

    query: int = 0
    key_value: int = 0
    expanded: bool = False

    def bytes(self, queries: float, keys_values: float, shared_by: float) -> float:
        """Of so many elements; `shared_by` query heads have a head of keys and values."""
        grouped = keys_values * self.key_value * (shared_by if self.expanded else 1) if shared_by > 1 else 0.0
        return queries * self.query + grouped


# FlashAttention 2 expands dK and dV to all query heads and sums them afterwards; 3 and 4 add them up in fp32. Read in
# their sources. cuDNN asks for what it needs when it runs: taken to be as much as FlashAttention 3.
WORKSPACES: dict[str | None, Workspace] = {
    "fa2": Workspace(4, 2, expanded=True),
    "fa3": Workspace(4, 4),
    "fa4": Workspace(4, 4),
    "cudnn": Workspace(4, 4),
    "cpu": Workspace(),
    None: Workspace(),
}


@dataclass(frozen=True)
class Rate:
    """How fast an attention kernel computes long tiles of heads of width 128 in bf16.

    Attributes:
        full: forward of a full tile, over the machine's peak.
        causal: rate of a causal tile over that of a full one.
        backward: rate of the backward over that of the forward, with 5/2 of its operations.
        source: where the three were published; "" where they are measured or chosen.
    """

    full: float
    causal: float
    backward: float
    source: str = ""


@dataclass(frozen=True)
class Machine:
    """Rates of one rank, and its links.

    Attributes:
        name: name of the preset or file.
        flops: peak operations a second of matrix products in the training dtype.
        memory: bytes of memory.
        memory_bandwidth: bytes a second of its memory.
        links: levels of the network, from inside to outside.
        kernels: attention kernel -> its rate; the first is the one that a plan takes.
        processors: thread blocks (128 rows of one head each) that run at a time.
        matmul: part of the peak that long matrix products reach.
        full_ramp: keys of a full tile at which half of the long rate is reached.
        causal_ramp: keys of a causal tile at which half of the long rate is reached.
        tail: idle time of the last thread blocks of a causal tile, in times of one block; half of it for a full tile.
        launch: seconds that a ring step costs whatever its size.
        operator: seconds of the host for an operator, Python around it included; 0 where it computes itself.
        host_bandwidth: bytes a second to host memory.
        host_memory: bytes of host memory of a node.
    """

    name: str
    flops: float
    memory: float
    memory_bandwidth: float
    links: tuple[Link, ...]
    kernels: Mapping[str, Rate]
    processors: int = 132
    matmul: float = 0.65
    full_ramp: float = 190.0
    causal_ramp: float = 640.0
    tail: float = 1.0
    launch: float = 150e-6
    operator: float = 8e-6
    host_bandwidth: float = 20e9
    host_memory: float = 2e12

    @property
    def ranks_per_node(self) -> int:
        """Ranks of the largest level but the one that joins nodes."""
        return self.links[-2].ranks if len(self.links) > 1 else self.links[0].ranks

    def rate(self, kernel: str | None) -> Rate:
        """The rate of a kernel; None: of the first. Raises `UspConfigError` where none is known."""
        kernel = next(iter(self.kernels)) if kernel is None else kernel
        if kernel not in self.kernels:
            raise UspConfigError(
                f"attention kernel {kernel!r:.100} on {self.name}",
                rule=f"a rate is known there of {', '.join(self.kernels)}",
                remedy="name one of these as the kernel",
            )
        return self.kernels[kernel]

    def tile(
        self, flops: float, length: float, rows: float, *, kernel: str | None = None, causal: bool, backward: bool
    ) -> float:
        """Seconds of attention tiles of `flops` in all, each `length` keys long; `rows`: query rows times heads."""
        ramp, of = self.causal_ramp if causal else self.full_ramp, self.rate(kernel)
        rate = self.flops * of.full * length / (length + ramp)
        rate *= (of.causal if causal else 1.0) * (of.backward if backward else 1.0)
        waves = max(1.0, rows / (128 * self.processors))
        return flops / rate * (1 + self.tail * (1.0 if causal else 0.5) / waves) + self.launch

    def all_to_all(self, payload: float, degree: int, stride: int = 1) -> float:
        """Seconds in which each of `degree` ranks, `stride` apart, deals `payload` bytes evenly to all and itself.

        All ranks of the machine do the same in their groups. The levels work at the same time; the slowest decides.
        """
        if degree == 1:
            return 0.0
        slowest, part = 0.0, 1
        for link in self._spanned(degree * stride):
            inside = min(degree, max(1, part // stride))
            if inside < degree:
                slowest = max(slowest, link.latency + payload * (1 - inside / degree) / _rate(link, part))
            part = link.ranks
        return slowest

    def hop(self, size: float, distance: int, span: int) -> float:
        """Seconds in which every rank sends `size` bytes to the one `distance` further on, around groups of `span`."""
        slowest, part = 0.0, 1
        for link in self._spanned(span):
            slowest = max(slowest, link.latency + size / _rate(link, min(distance, part)))
            part = link.ranks
        return slowest

    def ring_collective(self, size: float, degree: int, stride: int = 1) -> float:
        """Seconds of an all-gather or reduce-scatter of `size` bytes over `degree` ranks (an all-reduce is two).

        Libraries lay as many rings as a part has ranks of the group, so what leaves it uses all their links together;
        groups that lie between them (`stride` in all) share these.
        """
        if degree == 1:
            return 0.0
        slowest, part = 0.0, 1
        for link in self._spanned(degree * stride):
            members = max(1, part // stride)
            rate = link.bandwidth * members
            if link.shared is not None:
                rate = min(rate, link.shared / min(stride, part))
            slowest = max(slowest, link.latency + size * (degree - 1) / degree / rate)
            part = link.ranks
        return slowest

    def _spanned(self, span: int) -> tuple[Link, ...]:
        """The levels that a group of `span` neighbouring ranks reaches over."""
        below = [1, *(link.ranks for link in self.links[:-1])]
        spanned = tuple(link for link, part in zip(self.links, below, strict=True) if span > part)
        if span > self.links[-1].ranks:
            raise UspConfigError(
                f"{span} ranks on {self.name}, which has links for {self.links[-1].ranks}",
                rule="the outermost link holds all ranks",
                remedy="describe more nodes with Machine.with_nodes, or ask for fewer ranks",
            )
        return spanned


def _rate(link: Link, senders: int) -> float:
    """Bytes a second of each of `senders` ranks of one part that talk to other parts at the same time."""
    return link.bandwidth if link.shared is None else min(link.bandwidth, link.shared / senders)


MOST_RANKS = 1 << 20
GB = 1e9


def _cluster(inside: float, across: float) -> tuple[Link, ...]:
    """Nodes of eight with a switch inside, and a network card for every rank."""
    return (Link(8, inside * GB), Link(MOST_RANKS, across * GB, latency=40e-6))


# Eight cards on two sockets: pairs on a switch, two pairs on a socket's root complex; each link is shared by all cards
# that talk over it.
_PCIE4 = (
    Link(2, 24 * GB),
    Link(4, 12 * GB, shared=12 * GB),
    Link(8, 12 * GB, shared=12 * GB),
    Link(MOST_RANKS, 10 * GB, shared=10 * GB, latency=40e-6),
)

FA2 = "FlashAttention-2 paper (arXiv 2307.08691)"
FA3 = "FlashAttention-3 paper (arXiv 2407.08608)"
CUDNN = "cudnn-frontend, benchmark/sdpa_benchmark_training"

_AMPERE = {
    "fa2": Rate(0.70, 0.90, 0.85, FA2),
    "cudnn": Rate(0.58, 0.90, 0.85, "0.82 of FA2 (huggingface/transformers#48163)"),
}
# FA3's paper: 370, 335 and 322 TFLOP/s of FA2, 595, 539 and 516 of cuDNN 9.1, 648, 616 and 561 of FA3.
_HOPPER = {
    "cudnn": Rate(0.65, 0.90, 0.80, "cuDNN 9.19 on H200 reaches 0.70 (" + CUDNN + "), 9.1 on H100 0.60 (" + FA3 + ")"),
    "fa2": Rate(0.375, 0.90, 0.87, FA3),
    "fa3": Rate(0.655, 0.95, 0.87, FA3),
}
_HOPPER_NOW = _HOPPER | {
    "cudnn": Rate(0.70, 0.99, 0.83, CUDNN + ", h200_919_only_cudnn"),
    "fa3": Rate(0.65, 0.95, 0.87, FA3),
}
_H20 = {
    "cudnn": Rate(0.87, 0.90, 0.80, "129 TFLOP/s at 2K (Dao-AILab/flash-attention#1310); causal and backward as H100"),
    "fa2": Rate(0.57, 0.90, 0.87, "84 TFLOP/s at 2K (Dao-AILab/flash-attention#1310); causal and backward as H100"),
    "fa3": Rate(0.85, 0.95, 0.87, "126 TFLOP/s at 2K (Dao-AILab/flash-attention#1310); causal and backward as H100"),
}
_BLACKWELL = {
    "cudnn": Rate(0.72, 0.99, 0.77, CUDNN + ", GB200 in shares of its peak"),
    "fa4": Rate(0.68, 0.92, 0.88, "Dao-AILab/flash-attention#2280"),
    "fa2": Rate(
        0.25, 0.90, 0.87, "cuDNN is 2.86 times as fast (sgl-project/sglang#33655); causal and backward as H100"
    ),
}

# NVLink: two thirds of the links' one-way rate. Network: 80 % of the cards' rate, on the A800s, whose cards speak RDMA
# over Ethernet, 54 %. Memory: 90 % of the peak. Host memory: 2 TB, 1 TB where cards are on PCIe. The last is one core
# and gloo, as measured on a common server.
MACHINES: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        Machine("a100-nvlink", 312e12, 80e9, 1.8e12, _cluster(200, 20), _AMPERE, 108),
        Machine("a800-nvlink", 312e12, 80e9, 1.8e12, _cluster(133, 13.5), _AMPERE, 108),
        Machine("h100-nvlink", 989e12, 80e9, 3.0e12, _cluster(300, 40), _HOPPER),
        Machine("h200-nvlink", 989e12, 141e9, 4.3e12, _cluster(300, 40), _HOPPER_NOW),
        Machine("h20-nvlink", 148e12, 96e9, 3.6e12, _cluster(300, 40), _H20, 78),
        Machine("b200-nvlink", 2250e12, 180e9, 7.2e12, _cluster(600, 40), _BLACKWELL, 148),
        Machine(
            "l20-pcie",
            119.5e12,
            48e9,
            0.78e12,
            _PCIE4,
            {"fa2": Rate(0.90, 0.90, 0.75, "96 TFLOP/s causal, from the USP paper's table (arXiv 2405.07719)")},
            92,
            host_memory=1e12,
        ),
        Machine(
            "4090-pcie",
            165e12,
            24e9,
            0.9e12,
            _PCIE4,
            {"fa2": Rate(0.95, 0.90, 0.72, "169 TFLOP/s at 2K (apache/tvm, tl_doc/flash_perf.md)")},
            128,
            host_memory=1e12,
        ),
        Machine(
            "cpu",
            100e9,
            8e9,
            8e9,
            (Link(8, 1.2 * GB, latency=300e-6), Link(MOST_RANKS, 1.0 * GB, latency=500e-6)),
            {"cpu": Rate(0.8, 0.95, 0.95)},
            1,
            full_ramp=0.0,
            causal_ramp=0.0,
            tail=0.0,
            launch=500e-6,
            operator=0.0,
            host_bandwidth=8e9,
            host_memory=64e9,
        ),
    )
}


def recognised(device_name: str) -> str | None:
    """The preset that a GPU belongs to, by the name that its driver has for it; None: unknown, or other links.

    An H100 PCIe has no preset: its links are not those of the H100s with NVLink.
    """
    words = device_name.upper().replace("-", " ").split()
    for name in MACHINES:
        chip, _, links = name.partition("-")
        if name != "cpu" and chip.upper() in words and ("PCIE" not in words or links == "pcie"):
            return name
    return None


def check_machine(name: str) -> None:
    """Refuse a name that no preset has."""
    if not isinstance(name, str) or name not in MACHINES:
        raise UspConfigError(
            f"machine {name!r:.100}",
            rule=f"a machine is one of {', '.join(MACHINES)}",
            remedy="or measure yours: hf-usp check --output check.json, then name check.json as the machine",
        )
