"""Computed tables of memory.md, long.md and roofline.md in docs. `python -m tests.planner.recipes` writes them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hf_usp.planner import PlanRequest, longest, ranked
from hf_usp.planner.hardware import MACHINES, Machine
from hf_usp.planner.request import OPTIMIZERS, USABLE, USABLE_HOST
from hf_usp.planner.roofline import Prediction, attention, predict
from hf_usp.planner.search import arrangements
from hf_usp.planner.text import accelerate_config
from hf_usp.planner.workload import Degrees, ModelShape, TrainingStep

from .published import RUNS, TABLES, Run

DOCS = Path(__file__).parents[2] / "docs"
MODELS = {
    "Qwen3 0.6B": ModelShape(28, 1024, 3072, 16, 8, 128, 151936, tied=True, head_norms=True),
    "Llama 3 8B": ModelShape(32, 4096, 14336, 32, 8, 128, 128256),
    "Qwen3 32B": ModelShape(64, 5120, 25600, 64, 8, 128, 151936, head_norms=True),
    "Llama 3 70B": ModelShape(80, 8192, 28672, 64, 8, 128, 128256),
}
QWEN3_8B = ModelShape(36, 4096, 12288, 32, 8, 128, 151936, head_norms=True)
LENGTHS = (32, 128, 512, 2048)
GPUS = (1, 2, 4, 8, 16, 32, 64, 128)
MACHINE = MACHINES["h100-nvlink"]


def plan_for(model: ModelShape, tokens: int, gpus: int, optimizer: str = "fp32") -> PlanRequest:
    size, on_host = OPTIMIZERS[optimizer]
    return PlanRequest(
        "",
        model,
        MACHINE,
        tokens,
        gpus,
        MACHINE.memory * USABLE,
        most_tp=1,
        allow_offload=True,
        mlp_chunk_size=4096,
        layer_chunk_size=4096,
        keep_attention=True,
        like=TrainingStep(1, optimizer=size, offload_states=on_host, kernel="cudnn"),
        host_budget=MACHINE.host_memory * USABLE_HOST / min(8, gpus),
    )


def recipes() -> Iterator[str]:
    """The fewest GPUs that hold a sequence, and how."""
    yield "| model | tokens of a sequence | H100 80 GB | ulysses x ring | saving memory by | GB at the peak |"
    yield "|---|---|---|---|---|---|"
    for name, model in MODELS.items():
        for thousands in LENGTHS:
            for gpus in GPUS:
                best = ranked(plan_for(model, thousands * 1024, gpus))[0]
                if best.fits:
                    break
            d, it = best.degrees, best.prediction.memory
            data = f", {d.dp_shard} sequences at once" if d.dp_shard > 1 else ""
            yield (
                f"| {name} | {thousands}K | {gpus} | {d.ulysses} x {d.ring}{data} | {best.savings} | "
                f"{it.total / 1e9:.0f} |"
            )


def reaches() -> Iterator[str]:
    """The longest sequence on some numbers of GPUs, all of which share it, whatever the split."""
    yield f"| model | state of AdamW | {' | '.join(f'{gpus} GPUs' for gpus in GPUS[3:7])} |"
    yield "|---" * 6 + "|"
    for name, model in MODELS.items():
        for optimizer in OPTIMIZERS:
            reach = []
            for gpus in GPUS[3:7]:
                what = plan_for(model, 1 << 17, gpus, optimizer)
                found, d = max(((longest(what, d), d) for d in arrangements(what, 1, gpus)), key=lambda pair: pair[0])
                how = f" ({d.ulysses} x {d.ring})"
                reach.append(f"{found // 1024:,}K{how}" if found else "does not fit")
            yield f"| {name} | {optimizer} | {' | '.join(reach)} |"


MILLIONS = [("Qwen3 8B", 1, 8), ("Qwen3 8B", 2, 16), ("Llama 3 8B", 5, 8), ("Llama 3 8B", 8, 16), ("Qwen3 32B", 1, 8)]


def millions() -> Iterator[str]:
    """Steps of a million tokens and more with memory="auto" and AdamW's state in bf16."""
    yield (
        "| model | tokens | H100 80 GB | ulysses x ring | seconds of a step | MFU | GB of a GPU | GB of the host, a GPU"
        " | saving memory by |"
    )
    yield "|---" * 9 + "|"
    for name, tokens, gpus in MILLIONS:
        model = MODELS.get(name, QWEN3_8B)
        best = ranked(replace(plan_for(model, tokens << 20, gpus, "bf16"), auto=True))[0]
        d, it = best.degrees, best.prediction
        yield (
            f"| {name} | {tokens}M | {gpus} | {d.ulysses} x {d.ring} | {it.seconds:,.0f} | {it.mfu:.0%} "
            f"| {it.memory.total / 1e9:.0f} | {it.memory.host / 1e9:.0f} | {best.savings} |"
        )


def launches() -> Iterator[str]:
    """The lines that `hf-usp plan --auto` prints for two of them."""
    yield "```bash"
    for name, tokens, gpus in MILLIONS[:2]:
        what = replace(plan_for(QWEN3_8B, tokens << 20, gpus), name="Qwen/Qwen3-8B", auto=True)
        yield f"# {name}, {tokens}M tokens on {gpus} GPUs"
        printed = accelerate_config(what, ranked(what)[0]).splitlines()
        yield from (line.removeprefix("# ") for line in printed if line.startswith("#"))
    yield "```"


def others() -> Iterator[tuple[Run, Prediction, Prediction]]:
    """Runs of others, and the prediction for a ring that relays: with a state of AdamW in bf16, and in fp32."""
    for run in RUNS:
        job = replace(THEIRS, tokens=run.tokens, kernel=run.kernel)
        mesh = Degrees(run.ulysses, run.gpus // run.ulysses)
        model = MODELS.get(run.model, QWEN3_8B)
        yield run, *(predict(model, mesh, replace(job, optimizer=size), MACHINE) for size in (4, 12))


def published() -> Iterator[str]:
    """Runs of others beside the prediction."""
    yield (
        "| run | kernel | seconds, measured | predicted | predicted / measured | MFU, of the measured seconds "
        "| GB of a GPU, measured | predicted, AdamW in bf16 / fp32 |"
    )
    yield "|---" * 8 + "|"
    for run, half, full in others():
        digits = 1 if run.seconds < 100 else 0
        cells = [
            f"{run.who}, {run.model}, {run.tokens // 1024:,}K on {run.gpus}",
            run.kernel,
            *(f"{seconds:,.{digits}f}" for seconds in (run.seconds, half.seconds)),
            f"{half.seconds / run.seconds:.2f}",
            f"{half.mfu * half.seconds / run.seconds:.1%}",
            f"{run.gigabytes or '-'}",
            " / ".join(f"{it.memory.total / 1e9:.0f}" for it in (half, full)),
        ]
        yield f"| {' | '.join(cells)} |"


ROWS = (
    "LLAMA3-8B, 2 x 8 A800, 64K tokens (ring 2, 4, 8, 16)",
    "the same, 80K",
    "attention forward, 8 L20 on PCIe, 128K (ring 1, 2, 4, 8)",
    "the same, 32K",
    "attention forward, 8 A100 on NVLink, 32K",
    "attention, 8 A100 on NVLink, 128K",
)


def seconds(machine: Machine, ranks: int, tokens: int, timed: str, ulysses: int) -> float:
    """Of what a row of the USP paper's tables times: a step, or attention forward, or both its directions."""
    model, degrees = MODELS["Llama 3 8B"], Degrees(ulysses, ranks // ulysses)
    job = TrainingStep(tokens, relay=True, gradients=4)
    if timed == "step":
        return predict(model, degrees, job, machine).seconds
    directions = (False, True) if timed == "both" else (False,)
    return sum(attention(model, degrees, job, machine, backward=back).seconds for back in directions)


def degrees() -> Iterator[str]:
    """Published / predicted throughput, both over the best of their row."""
    yield "| table | ulysses 8 | 4 | 2 | 1 |"
    yield "| --- | --- | --- | --- | --- |"
    for label, (name, ranks, tokens, timed, table) in zip(ROWS, TABLES, strict=True):
        mine = {u: seconds(MACHINES[name], ranks, tokens, timed, u) for u in table}
        pairs = ((table[u] / max(table.values()), min(mine.values()) / mine[u]) for u in table)
        cells = (" / ".join("1" if x == 1 else f"{x:.3f}" for x in pair) for pair in pairs)
        yield f"| {label} | {' | '.join(cells)} |"


# Others pass whole blocks on and send fp32 gradients.
THEIRS = TrainingStep(1, checkpointing=True, loss_chunk_size=2048, relay=True, gradients=4)
PAGES = {
    DOCS / "memory.md": {"recipes": recipes, "reaches": reaches},
    DOCS / "long.md": {"millions": millions, "launches": launches},
    DOCS / "roofline.md": {"degrees": degrees, "published": published},
}


def written(page: Path) -> str:
    """The page with its tables as they are computed now."""
    text = page.read_text(encoding="utf-8")
    for name, rows in PAGES[page].items():
        table = "\n".join(rows())
        text, found = re.subn(f"(<!-- {name} -->\n).*?(\n<!-- end -->)", rf"\g<1>{table}\g<2>", text, flags=re.S)
        assert found == 1, name
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(written(page), encoding="utf-8")
