"""Findings of a check, and the rules that find them. Numbers in, sentences out: no communication."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_high
from typing import Any

PROBLEM, WARNING = "problem", "warning"


@dataclass(frozen=True)
class Finding:
    """One result of a rule.

    Attributes:
        level: "problem" (a run would be wrong or fail; exit code 1) or "warning" (it is slower than it could be).
        text: the finding.
        remedy: the remedy.
    """

    level: str
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Transfer:
    """One measured transfer.

    Attributes:
        kind: "pair", "all-to-all" or "ring".
        ranks: the ranks that took part.
        inside: whether they share a node.
        latency: seconds of a tiny message.
        bandwidth: bytes a second in one direction.
    """

    kind: str
    ranks: tuple[int, ...]
    inside: bool
    latency: float
    bandwidth: float


def span(ranks: Sequence[int]) -> str:
    """Ranks in words: "rank 3", "ranks 0-3, 8"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def differing_versions(facts: Sequence[dict[str, Any]]) -> list[Finding]:
    """Ranks whose packages, sources or devices are not those of most ranks."""
    found = []
    names = sorted({name for fact in facts for name in fact["versions"]})
    for name in names:
        values = [fact["versions"].get(name) for fact in facts]
        usual, count = Counter(values).most_common(1)[0]
        if count == len(values):
            continue
        for other in sorted({v for v in values if v != usual}, key=str):
            ranks = [rank for rank, value in enumerate(values) if value == other]
            hosts = ", ".join(sorted({facts[rank]["host"] for rank in ranks}))
            have = "is not installed" if other is None else f"is {other}"
            usually = "not installed" if usual is None else usual
            found.append(
                Finding(
                    PROBLEM,
                    f"{name} {have} on {span(ranks)} ({hosts}), {usually} on the others",
                    "the same environment on every node: install the same versions there",
                )
            )
    devices = [fact["device"] for fact in facts]
    if len(set(devices)) > 1:
        text = "; ".join(
            f"{span([r for r, d in enumerate(devices) if d == device])}: {device}" for device in sorted(set(devices))
        )
        found.append(Finding(WARNING, f"unlike devices: {text}", "every step waits for the slowest one"))
    return found


def shared_devices(facts: Sequence[dict[str, Any]]) -> list[Finding]:
    """Two ranks on one GPU."""
    places = Counter((fact["host"], fact["device_index"]) for fact in facts if fact["device_index"] is not None)
    return [
        Finding(
            PROBLEM,
            f"{count} ranks use GPU {index} of {host}",
            "start as many processes a node as it has GPUs, and let the launcher set LOCAL_RANK",
        )
        for (host, index), count in places.items()
        if count > 1
    ]


def wrong_placement(nodes: Sequence[Any], cp_size: int, ulysses: int) -> list[Finding]:
    """Ulysses groups across nodes. `nodes[rank]` names the node of a rank; groups are of consecutive ranks."""
    counts = Counter(nodes)
    order = list(dict.fromkeys(nodes))
    scattered = list(nodes) != sorted(nodes, key=order.index)
    crossing = [
        tuple(range(start, start + ulysses))
        for start in range(0, len(nodes), ulysses)
        if len(set(nodes[start : start + ulysses])) > 1
    ]
    if not crossing:
        return []
    smallest = min(counts.values())
    first = f"the ulysses group of {span(crossing[0])} lies on {len({nodes[r] for r in crossing[0]})} nodes"
    if scattered and ulysses <= smallest:
        return [
            Finding(
                PROBLEM,
                f"{first}, although it would fit inside one: consecutive ranks are on different nodes",
                "number ranks node by node (torchrun does; check the order of the hostfile or of --node_rank)",
            )
        ]
    fits = [
        d for d in range(1, min(smallest, cp_size) + 1) if cp_size % d == 0 and all(c % d == 0 for c in counts.values())
    ]
    remedy = (
        f"ulysses degrees that stay inside nodes of {smallest} ranks: {', '.join(map(str, fits))}; ring goes across"
    )
    if ulysses <= smallest:
        return [
            Finding(PROBLEM, f"{first}, although a node has {smallest} ranks: {ulysses} does not divide them", remedy)
        ]
    return [Finding(WARNING, f"{first}: ulysses degree {ulysses} is larger than a node ({smallest} ranks)", remedy)]


def slow_links(transfers: Sequence[Transfer], slow: float) -> list[Finding]:
    """Ways with less than `slow` times the bandwidth of the median of their kind, inside nodes and across apart.

    A rank that is slow towards every partner is named once, instead of all its pairs.
    """
    found = []
    for kind in ("pair", "all-to-all", "ring"):
        for inside in (True, False):
            alike = [t for t in transfers if t.kind == kind and t.inside == inside]
            sizes = {len(t.ranks) for t in alike}
            for size in sorted(sizes):
                group = [t for t in alike if len(t.ranks) == size]
                found += _slow_among(group, slow, f"{kind} {'inside a node' if inside else 'across nodes'}")
    return found


def _slow_among(alike: list[Transfer], slow: float, where: str) -> list[Finding]:
    if len(alike) < 2:
        return []
    usual = median_high(t.bandwidth for t in alike)
    if len(alike) == 2:  # neither is the usual one: only a large difference says something
        slow *= slow
    bad = [t for t in alike if t.bandwidth < slow * usual]
    remedy = "look at this link (nvidia-smi topo -m, ibstat, ethtool) and at what else runs there"
    hits, total = (Counter(rank for t in group for rank in t.ranks) for group in (bad, alike))
    named = [rank for rank in sorted(hits) if hits[rank] == total[rank] and total[rank] > 1]
    found = []
    for rank in named:
        worst = min(t.bandwidth for t in bad if rank in t.ranks)
        found.append(Finding(WARNING, f"rank {rank} is slow: {where} {rate(worst)}, others have {rate(usual)}", remedy))
    for t in bad:
        if not set(t.ranks) & set(named):
            text = f"slow link: {where}, {span(t.ranks)}, {rate(t.bandwidth)}; others have {rate(usual)}"
            found.append(Finding(WARNING, text, remedy))
    return found


def rate(bandwidth: float) -> str:
    """Bytes a second in words."""
    return f"{bandwidth / 1e9:.2f} GB/s"
