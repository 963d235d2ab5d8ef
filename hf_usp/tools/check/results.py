"""What a check is asked to do, and everything that it found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .issues import PROBLEM, Finding, Transfer


@dataclass(frozen=True)
class CheckOptions:
    """model: whose small copy is run. cp_size, ulysses: the mesh (default: all ranks, chosen by bytes).

    ranks_per_node: consecutive ranks that count as one node; None: those of a host. timeout: seconds for a stage.
    message: bytes of a large one. slow: share of the median below which a link is said to be slow.
    """

    model: str | None = None
    cp_size: int | None = None
    ulysses: int | None = None
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bf16"
    ranks_per_node: int | None = None
    soak_minutes: float = 0.0
    timeout: float = 120.0
    message: int | None = None
    slow: float = 0.5
    output: str | None = None


@dataclass
class Results:
    """Everything that was found; the file holds the same."""

    command: str = ""
    world: int = 1
    cp_size: int = 1
    ulysses: int = 1
    reason: str = ""
    nodes: list[Any] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    speed: list[dict[str, float]] = field(default_factory=list)
    exactness: dict[str, float] = field(default_factory=dict)
    refused: str | None = None
    soak: dict[str, float] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return int(any(finding.level == PROBLEM for finding in self.findings))
