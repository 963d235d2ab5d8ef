"""The tables of docs/memory.md, from the planner. `python -m tests.planner.recipes` writes them anew."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from hf_usp.planner import PlanRequest, longest, ranked
from hf_usp.planner.hardware import MACHINES
from hf_usp.planner.request import USABLE
from hf_usp.planner.workload import ModelShape

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
MODELS = {
    "Qwen3 0.6B": ModelShape(28, 1024, 3072, 16, 8, 128, 151936, tied=True),
    "Llama 3 8B": ModelShape(32, 4096, 14336, 32, 8, 128, 128256),
    "Qwen3 32B": ModelShape(64, 5120, 25600, 64, 8, 128, 151936),
    "Llama 3 70B": ModelShape(80, 8192, 28672, 64, 8, 128, 128256),
}
LENGTHS = (32, 128, 512, 2048)
GPUS = (1, 2, 4, 8, 16, 32, 64, 128)
MACHINE = MACHINES["h100-nvlink"]


def plan_for(model: ModelShape, tokens: int, gpus: int) -> PlanRequest:
    budget = MACHINE.memory * USABLE
    return PlanRequest("", model, MACHINE, tokens, gpus, budget, most_tp=1, allow_offload=True, mlp_chunk_size=4096)


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
    """The longest sequence on some numbers of GPUs, all of which share it."""
    yield f"| model | {' | '.join(f'{gpus} GPUs' for gpus in GPUS[3:7])} |"
    yield "|---" * 5 + "|"
    for name, model in MODELS.items():
        reach = []
        for gpus in GPUS[3:7]:
            what = plan_for(model, 1 << 17, gpus)
            found = longest(what, next(c.degrees for c in ranked(what) if c.degrees.cp == gpus))
            reach.append(f"{found // 1024:,}K" if found else "does not fit")
        yield f"| {name} | {' | '.join(reach)} |"


TABLES = {"recipes": recipes, "reaches": reaches}


def written(page: str) -> str:
    """The page with its tables as they are computed now."""
    for name, rows in TABLES.items():
        table = "\n".join(rows())
        page = re.sub(f"(<!-- {name} -->\n).*?(\n<!-- end -->)", rf"\g<1>{table}\g<2>", page, flags=re.S)
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
