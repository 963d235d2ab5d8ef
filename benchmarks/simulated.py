"""The planner's memory beside the step simulated at its real size: models of 8 to 70 billion parameters, 128K to 5M.

    python benchmarks/simulated.py              (all layers; 40 minutes on an idle core)
    python benchmarks/simulated.py --layers 4   (layers between the bottom and the top one are alike)

Nothing is computed and no memory is needed (`hf_usp.tools.simulate`). Exits with 1 where a prediction is more than 5 %
off. Writes results/simulated-<date>.md.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from notes import machine_notes
from transformers import AutoConfig

from hf_usp.planner.memory_model import memory
from hf_usp.planner.request import shape_of
from hf_usp.planner.workload import Degrees, TrainingStep
from hf_usp.tools.simulate import simulate

LLAMA: dict[str, Any] = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128}
MODELS: dict[str, dict[str, Any]] = {
    "Llama 3 8B": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32},
    "Llama 3 70B": LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80},
    "Qwen3 32B": LLAMA
    | {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_attention_heads": 64,
        "num_hidden_layers": 64,
        "tie_word_embeddings": False,
    },
}
K, M = 1 << 10, 1 << 20
MESHES = {"1 x 8": Degrees(1, 8), "8 x 1": Degrees(8, 1), "2 x 4": Degrees(2, 4), "4 x 8": Degrees(4, 8)}
STEPS = {
    "checkpointing": TrainingStep(1, checkpointing=True, loss_chunk_size=2048),
    "everything": TrainingStep(1, checkpointing=True, loss_chunk_size=8192, mlp_chunk_size=16384, offload=True),
}
ROWS = [
    *(("Llama 3 8B", tokens, mesh) for tokens in (128 * K, 1 * M, 5 * M) for mesh in ("1 x 8", "8 x 1", "2 x 4")),
    *(("Qwen3 32B", tokens, "2 x 4") for tokens in (128 * K, 1 * M)),
    *(("Qwen3 32B", tokens, "4 x 8") for tokens in (1 * M, 5 * M)),
    *(("Llama 3 70B", tokens, "4 x 8") for tokens in (128 * K, 1 * M, 5 * M)),
]


def row(model: str, tokens: int, mesh: str, step: str, kernel: str, layers: int | None) -> tuple[str, float]:
    """A line of the table, and predicted over simulated."""
    sizes = MODELS[model] | ({} if layers is None else {"num_hidden_layers": layers})
    config = AutoConfig.for_model(**sizes, max_position_embeddings=8 * M)
    job, degrees, start = replace(STEPS[step], tokens=tokens, kernel=kernel), MESHES[mesh], time.monotonic()
    live, planned = simulate(config, degrees, job, inventory=False), memory(shape_of(config), degrees, job)
    simulated = live.there + live.optimizer + live.peak
    phase = max(live.phases, key=lambda name: live.phases[name].peak)
    cells = [
        model,
        f"{tokens // K:,}K",
        mesh,
        step,
        kernel,
        f"{simulated / 1e9:.2f}",
        f"{planned.total / 1e9:.2f}",
        f"{planned.total / simulated:.3f}",
        phase,
        planned.peak,
        f"{time.monotonic() - start:.0f}",
    ]
    return f"| {' | '.join(cells)} |", planned.total / simulated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="layers of every model (default: all)")
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()
    lines = [
        "| model | tokens | ulysses x ring | saving | kernel | simulated, GB | planner, GB | planner / simulated "
        "| simulated peak | planner's | seconds |",
        "|---" * 11 + "|",
    ]
    ratios = []
    for model, tokens, mesh in ROWS:
        for step in STEPS:
            line, ratio = row(model, tokens, mesh, step, "fa2" if step == "everything" else "cudnn", args.layers)
            lines.append(line)
            ratios.append(ratio)
            print(line, flush=True)
    notes = machine_notes("python benchmarks/simulated.py" + (f" --layers {args.layers}" if args.layers else ""))
    head = f"AdamW with fp32 state, FSDP2 over the mesh, bytes of rank 0; layers: {args.layers or 'all'}."
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / f"simulated-{date.today().isoformat()}.md"
    title = "# The planner's memory, and the step simulated at full size"
    file.write_text("\n\n".join([title, *notes.values(), head, "\n".join(lines)]) + "\n", encoding="utf-8")
    print(f"written to {file}; planner / simulated {min(ratios):.3f} to {max(ratios):.3f}")
    if not all(0.95 < ratio < 1.05 for ratio in ratios):
        raise SystemExit("a prediction is more than 5 % off")


if __name__ == "__main__":
    main()
