"""Bytes that a rank needs for one more token, against the length of the row, for each way to save memory; a picture.

    python benchmarks/bytes_a_token.py      (Llama 3 8B on a ring of 8; ten minutes on an idle core)

One more token of a rank costs so many hidden states (8,192 bytes for Llama 3 8B in bf16): the slope of the peak
between a length and its double. The planner's is a line, that of the step simulated at its real size
(`hf_usp.tools.simulate`) a dot on it. Beside them, the most that published runs can have needed: what their GPUs hold
beside weights and optimizer, over their tokens. No GPU has run ours. Writes results/bytes_a_token-<date>.md, .json and
.png. Exits with 1 where a prediction is more than 5 % off.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

from matplotlib.figure import Figure
from notes import machine_notes
from simulated import MODELS, K, M
from transformers import AutoConfig

from hf_usp.planner.memory_model import memory
from hf_usp.planner.request import shape_of
from hf_usp.planner.workload import Degrees, TrainingStep
from hf_usp.tools.simulate import simulate

MODEL, RING = "Llama 3 8B", Degrees(1, 8)
HOST = TrainingStep(1, checkpointing=True, offload=True, loss_chunk_size=2048, kernel="fa2")
CHUNKS = replace(HOST, mlp_chunk_size=16384)
LAYERS = replace(CHUNKS, layer_chunk_size=16384)
WAYS = {
    "checkpoints in host memory": HOST,
    "MLPs and norms in chunks": CHUNKS,
    "layers in chunks": LAYERS,
    "attention in 2 groups of heads": replace(LAYERS, head_groups=2),
    "attention in 4 groups of heads": replace(LAYERS, head_groups=4),
    "and its output in host memory": replace(LAYERS, head_groups=4, keep_attention=1),  # of all layers
}
LENGTHS = [128 * K << i for i in range(7)]
SIMULATED = (2 * M,)  # below, tensors of a chunk and gathered weights are the peak
# Tokens, GPUs, width, GB of a GPU (92 % of 80 GB, or as published), GB of weights, gradients and optimizer.
PUBLISHED = {
    "UPipe, Llama 3 8B, 5M": (5_000_000, 8, 4096, 73.6, 16.1),
    "ALST, Llama 3 8B, 3.7M": (3_700_000, 8, 4096, 73.6, 4.0),
    "TRL, Qwen3 8B, 1M": (1 << 20, 8, 4096, 56.2, 16.4),
}


def slopes(peak: Callable[[int], float], lengths: Sequence[int], width: int) -> dict[int, float]:
    """Length -> hidden states in bf16 that a token of a rank adds, from the peaks there and at twice the length."""
    peaks = {n: peak(n) for n in sorted({*lengths, *(2 * n for n in lengths)})}
    return {n: (peaks[2 * n] - peaks[n]) / (n / RING.cp * width * 2) for n in lengths}


def simulated(job: TrainingStep, layers: int) -> dict[int, float]:
    """`slopes` of the step simulated at its real size, with so many layers."""
    config = AutoConfig.for_model(**MODELS[MODEL] | {"num_hidden_layers": layers}, max_position_embeddings=16 * M)
    job = replace(job, keep_attention=layers * job.keep_attention)
    return slopes(
        lambda n: simulate(config, RING, replace(job, tokens=n), inventory=False).peak, SIMULATED, config.hidden_size
    )


def predicted(job: TrainingStep) -> dict[int, float]:
    """The same by the planner's formulas, with all layers."""
    model = shape_of(AutoConfig.for_model(**MODELS[MODEL], max_position_embeddings=16 * M))
    job = replace(job, keep_attention=model.layers * job.keep_attention)
    return slopes(lambda n: memory(model, RING, replace(job, tokens=n)).total, LENGTHS, model.hidden)


def picture(lines: dict[str, dict[int, float]], dots: dict[str, dict[int, float]]) -> Figure:
    """Length of the row against hidden states a token, a line and its dots for each way."""
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.subplots()
    for way, values in lines.items():
        (line,) = axes.plot(list(values), list(values.values()), label=way)
        axes.plot(list(dots[way]), list(dots[way].values()), "o", color=line.get_color())
    for name, (tokens, gpus, width, gb, states) in PUBLISHED.items():
        most = (gb - states) * 1e9 / (tokens / gpus * width * 2)
        axes.plot(tokens, most, "kv")
        axes.annotate(
            f"{name}: at most", (tokens, most), textcoords="offset points", xytext=(-6, 6), ha="right", fontsize=8
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(LENGTHS, [f"{n // K}K" if n < M else f"{n // M}M" for n in LENGTHS])
    axes.set_ylim(0)
    axes.set_xlabel("tokens of the row, on 8 GPUs")
    axes.set_ylabel("hidden states at the peak, for one more token of a rank")
    axes.set_title(f"{MODEL} in bf16, ring of 8: predicted (lines) and simulated at full size (dots)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers", type=int, default=3, help="layers of the simulated model; its inner layers are alike"
    )
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()
    lines: dict[str, dict[int, float]] = {}
    dots: dict[str, dict[int, float]] = {}
    table = ["| way | tokens | predicted | simulated | predicted / simulated |", "|---" * 5 + "|"]
    for way, job in WAYS.items():
        lines[way], dots[way] = predicted(job), simulated(job, args.layers)
        for n, seen in dots[way].items():
            said = lines[way][n]
            table.append(f"| {way} | {n // K:,}K | {said:.2f} | {seen:.2f} | {said / seen:.3f} |")
            print(table[-1], flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    name = f"bytes_a_token-{date.today().isoformat()}"
    notes = machine_notes(f"python benchmarks/bytes_a_token.py --layers {args.layers}")
    title = "# Hidden states at the peak, for one more token of a rank"
    head = f"{MODEL} in bf16 on a ring of 8, FlashAttention 2, loss in chunks, inputs of layers in host memory.\n"
    text = "\n\n".join([title, *notes.values(), head, "\n".join(table), f"![lines and dots]({name}.png)"])
    (args.output / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    record = {"notes": notes, "predicted": lines, "simulated": dots, "published": PUBLISHED}
    (args.output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    picture(lines, dots).savefig(args.output / f"{name}.png", dpi=120)
    if not all(abs(lines[way][n] / seen - 1) < 0.05 for way in dots for n, seen in dots[way].items()):
        raise SystemExit("a prediction is more than 5 % off")


if __name__ == "__main__":
    main()
