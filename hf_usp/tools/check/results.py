"""The options of a check, and its results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .issues import PROBLEM, Finding, Transfer


@dataclass(frozen=True)
class CheckOptions:
    """Options of a check.

    Attributes:
        model: model whose small copy is run; None: none.
        cp_size: ranks of the mesh; None: all.
        ulysses: ulysses degree; None: chosen by bytes.
        heads: query heads of the attention that is measured.
        kv_heads: its kv heads.
        head_dim: its width of a head.
        dtype: its dtype.
        ranks_per_node: consecutive ranks that count as one node; None: those of a host.
        soak_minutes: minutes of repetition.
        timeout: seconds for a stage.
        message: bytes of a large message; None: chosen.
        slow: part of the median below which a link is reported as slow.
        output: file for the results; None: none.
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
    """The results; the file holds the same.

    Attributes:
        command: command line.
        world: number of ranks.
        cp_size: ranks of the mesh.
        ulysses: ulysses degree.
        reason: why this degree.
        nodes: node of each rank.
        facts: environment of each rank.
        transfers: measured transfers.
        speed: measured rates of each rank.
        exactness: errors against the definition.
        refused: why the model was refused; None: it was not.
        soak: results of the repetition.
        findings: results of the rules.
    """

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
