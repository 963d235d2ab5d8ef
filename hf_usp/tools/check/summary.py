"""The results on one screen."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from ...kernels import Choice, choice_lines
from .issues import Transfer, rate

if TYPE_CHECKING:
    from .results import Results

MOST = 12


def verdict(it: Results, slow: float) -> str:
    """Some twenty lines."""
    lines = [f"hf-usp check: {it.world} rank(s) on {len(set(it.nodes)) or 1} node(s)"]
    if it.facts:
        first = it.facts[0]
        versions = first["versions"]
        lines.append(
            f"{first['device']}; "
            + ", ".join(f"{n} {versions[n]}" for n in ("hf_usp", "torch", "transformers", "accelerate"))
        )
        lines += _kernels(first["kernels"])
    if it.speed:
        flops = [s["flops"] / 1e12 for s in it.speed]
        copies = [s["memory_bandwidth"] / 1e9 for s in it.speed]
        lines.append(
            f"every rank  {min(flops):.3g} to {max(flops):.3g} TFLOP/s in matrix products, "
            f"{min(copies):.3g} to {max(copies):.3g} GB/s of memory"
        )
    lines += _links(it.transfers)
    if it.exactness:
        worst = max(it.exactness, key=lambda name: it.exactness[name])
        state = "exact" if it.exactness[worst] <= 1 else "WRONG"
        lines.append(
            f"exactness   {state}: {len(it.exactness)} comparison(s), largest error {it.exactness[worst]:.2g} of the "
            f"allowed ({worst})"
        )
    if it.soak:
        lines.append(
            f"soak        {it.soak['rounds']:.0f} rounds in {it.soak['seconds']:.0f} s, "
            f"slowest {it.soak['slowest_round']:.2f} s"
        )
    if it.facts:
        lines.append(f"mesh        ulysses {it.ulysses} x ring {it.cp_size // it.ulysses}: {it.reason}")
    lines.append("")
    for finding in it.findings[:MOST]:
        lines.append(
            f"{finding.level.upper()}: {finding.text}" + (f". Remedy: {finding.remedy}." if finding.remedy else ".")
        )
    if len(it.findings) > MOST:
        lines.append(f"... and {len(it.findings) - MOST} more, in the file (--output)")
    problems = sum(finding.level == "problem" for finding in it.findings)
    warnings = len(it.findings) - problems
    lines.append(
        "OK" + (f", {warnings} warning(s)" if warnings else "") if not problems else f"NOT OK: {problems} problem(s)"
    )
    return "\n".join(lines)


def _kernels(listed: list[list[Any]]) -> list[str]:
    first, *others = choice_lines([Choice(*entry) for entry in listed])
    return [f"kernel      {first}", *(f"            {line}" for line in others)]


def _links(transfers: list[Transfer]) -> list[str]:
    """A line for each kind and size of group: the median of all, and the slowest."""
    lines = []
    for kind, size, inside in dict.fromkeys((t.kind, len(t.ranks), t.inside) for t in transfers):
        alike = [t for t in transfers if (t.kind, len(t.ranks), t.inside) == (kind, size, inside)]
        of = "" if kind == "pair" else f" of {size}"
        lines.append(
            f"{kind + of:<17}{'inside a node ' if inside else 'across nodes  '}"
            f"{rate(median(t.bandwidth for t in alike))} (slowest {rate(min(t.bandwidth for t in alike))}), "
            f"latency {median(t.latency for t in alike) * 1e6:.0f} us, {len(alike)} measured"
        )
    return lines
