"""Machines as a roofline sees them: rates of one rank, and links nested from the fastest to the slowest. No torch.

A *level* is a group of neighbouring ranks (a node, a PCIe switch) and the link that joins its parts: the level below,
or single ranks. Ranks are numbered so that neighbours share the lowest level they can, as launchers do.

Bandwidths are achieved ones, in bytes a second, one way. Peak rates and memory sizes are the vendors'. The other
figures are round ones, the same for all machines where nothing speaks against it: the ramps follow the published curves
of FlashAttention-2 (arXiv 2307.08691), the rest was chosen so that one set agrees with the order of the degrees in all
published tables (docs/roofline.md). They rank ways to run; they do not promise seconds.
"""

from __future__ import annotations

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
class Machine:
    """Rates of one rank, and its links.

    Attributes:
        name: name of the preset or file.
        flops: peak operations a second of matrix products in the training dtype.
        memory: bytes of memory.
        memory_bandwidth: bytes a second of its memory.
        links: levels of the network, from inside to outside.
        processors: thread blocks (128 rows of one head each) that run at a time.
        matmul: part of the peak that long matrix products reach.
        attention: part of the peak that long full attention tiles reach.
        backward: rate of attention's backward over its forward.
        causal: rate of a long causal tile over a full one.
        full_ramp: keys of a full tile at which half of the long rate is reached.
        causal_ramp: keys of a causal tile at which half of the long rate is reached.
        tail: idle time of the last thread blocks of a causal tile, in times of one block; half of it for a full tile.
        launch: seconds that a ring step costs whatever its size.
        host_bandwidth: bytes a second to host memory.
    """

    name: str
    flops: float
    memory: float
    memory_bandwidth: float
    links: tuple[Link, ...]
    processors: int = 132
    matmul: float = 0.65
    attention: float = 0.65
    backward: float = 0.8
    causal: float = 0.9
    full_ramp: float = 190.0
    causal_ramp: float = 640.0
    tail: float = 1.0
    launch: float = 150e-6
    host_bandwidth: float = 20e9

    @property
    def ranks_per_node(self) -> int:
        """Ranks of the largest level but the one that joins nodes."""
        return self.links[-2].ranks if len(self.links) > 1 else self.links[0].ranks

    def tile(self, flops: float, length: float, rows: float, *, causal: bool, backward: bool) -> float:
        """Seconds of attention tiles of `flops` in all, each `length` keys long; `rows`: query rows times heads."""
        ramp = self.causal_ramp if causal else self.full_ramp
        rate = self.flops * self.attention * length / (length + ramp)
        rate *= (self.causal if causal else 1.0) * (self.backward if backward else 1.0)
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

# NVLink: two thirds of the links' one-way rate. Network: 80 % of the cards' rate, on the A800s, whose cards speak RDMA
# over Ethernet, 54 %. Memory: 90 % of the peak. The last is one core and gloo, as measured on a common server.
MACHINES: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        Machine("a100-nvlink", 312e12, 80e9, 1.8e12, _cluster(200, 20), 108),
        Machine("a800-nvlink", 312e12, 80e9, 1.8e12, _cluster(133, 13.5), 108),
        Machine("h100-nvlink", 989e12, 80e9, 3.0e12, _cluster(300, 40)),
        Machine("h200-nvlink", 989e12, 141e9, 4.3e12, _cluster(300, 40)),
        Machine("b200-nvlink", 2250e12, 180e9, 7.2e12, _cluster(600, 40), 148),
        Machine("l20-pcie", 119.5e12, 48e9, 0.78e12, _PCIE4, 92, attention=0.82),
        Machine("4090-pcie", 165e12, 24e9, 0.9e12, _PCIE4, 128, attention=0.82),
        Machine(
            "cpu",
            100e9,
            8e9,
            8e9,
            (Link(8, 1.2 * GB, latency=300e-6), Link(MOST_RANKS, 1.0 * GB, latency=500e-6)),
            1,
            attention=0.8,
            backward=0.95,
            causal=0.95,
            full_ramp=0.0,
            causal_ramp=0.0,
            tail=0.0,
            launch=500e-6,
            host_bandwidth=8e9,
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
