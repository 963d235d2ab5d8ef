"""The same fine-tuning in one process and on 4 CPU processes (ulysses 2 x ring 2), loss next to loss, and a picture.

    make quickstart    SmolLM2-135M, 4 steps of 1,024 tokens     a few minutes on 2 cores
    make long          a fresh small Qwen3, 4 steps of 32,768    about 4 minutes on 2 cores, losses 5.6 to 4

Both runs are the commands that are printed; this script only starts them and compares the losses they logged. It ends
with exit code 1 where a loss differs by more than --tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
MESH = "--context-parallel-size 4 --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2"
COMMON = (
    "--use_cpu --per_device_train_batch_size 1 --logging_steps 1 --lr_scheduler_type constant --save_strategy no "
    "--report_to none"
)
PRESETS = {
    "quickstart": "--sequence_length 1024 --max_steps 4 --learning_rate 1e-4",
    "long": "--config_name configs/qwen3_small.json --sequence_length 32768 --max_steps 4 --learning_rate 3e-3",
}


@dataclass(frozen=True)
class Run:
    """The record of a finished run: one loss and gradient norm per step, and how long everything took."""

    losses: list[float]
    grad_norms: list[float]
    seconds: float


def write_text(path: Path) -> None:
    """The Python documentation of the standard library, 465,000 characters, as one long document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(pydoc_data.topics.topics.values()), encoding="utf-8")


def run(title: str, launcher: str, flags: list[str], folder: Path, threads: int) -> Run:
    """Start a training, let it show its progress, and read its log."""
    flags = [*flags, "--output_dir", str(folder)]
    print(f"\n== {title}\n   {launcher} {shlex.join(flags)}\n", flush=True)
    # The same programs as in the printed line, from the environment that runs this script.
    command = launcher.replace("accelerate launch", "python -m accelerate.commands.launch", 1).split()[1:] + flags
    start = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, *command], cwd=HERE.parent, env=environment, check=True)
    seconds = time.monotonic() - start
    history = json.loads((HERE.parent / folder / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    return Run([s["loss"] for s in steps], [s["grad_norm"] for s in steps], seconds)


def table(one: Run, mesh: Run) -> str:
    """Step by step: loss in one process, loss on the mesh, their difference; and the gradient norms."""
    lines = ["step   one process   2x2 mesh   difference   gradient norm: one process   2x2 mesh"]
    for step, (a, b, ga, gb) in enumerate(
        zip(one.losses, mesh.losses, one.grad_norms, mesh.grad_norms, strict=True), start=1
    ):
        lines.append(f"{step:4d}   {a:11.6f}   {b:8.6f}   {abs(a - b):10.1e}   {ga:26.5f}   {gb:8.5f}")
    lines.append(f"time   {one.seconds:9.0f} s   {mesh.seconds:6.0f} s   (start-up included, on the same cores)")
    return "\n".join(lines)


def verdict(one: Run, mesh: Run, tolerance: float) -> int:
    """Exit code 0 where all losses agree, NaN being different from everything; says so."""
    worst = max((abs(a - b) for a, b in zip(one.losses, mesh.losses, strict=True)), key=lambda x: (x != x, x))
    same = worst <= tolerance
    print(f"{'same' if same else 'DIFFERENT'} losses: largest difference {worst:.1e}, tolerance {tolerance:.0e}")
    return 0 if same else 1


def draw(one: Run, mesh: Run, title: str, path: Path) -> None:
    """Both loss curves, and the distance between them on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    steps = range(1, len(one.losses) + 1)
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 6), height_ratios=(2, 1))
    above.plot(steps, one.losses, "-", color="#1f77b4", linewidth=5, alpha=0.4, label="one process")
    above.plot(steps, mesh.losses, "o--", color="#d62728", label="4 processes: ulysses 2 x ring 2")
    above.set(title=title, ylabel="loss")
    above.legend()
    # Equal losses have no place on a logarithmic axis: they are drawn at its lower end, one fp32 rounding step.
    difference = [max(abs(a - b), 1e-7) for a, b in zip(one.losses, mesh.losses, strict=True)]
    below.semilogy(steps, difference, "s-", color="#555555")
    below.set(xlabel="step", ylabel="difference", ylim=(5e-8, max(1e-3, 2 * max(difference))))
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="quickstart")
    parser.add_argument("--model", help="model to fine-tune: a folder or a hub name")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of a loss (default 1e-4)")
    parser.add_argument("--output", type=Path, help="default: runs/PRESET")
    parser.add_argument("--extra", default="", help="more flags for scripts/finetune.py, which win over the preset's")
    args = parser.parse_args()
    output = args.output or Path("runs") / args.preset
    text = output / "python_documentation.txt"
    write_text(HERE.parent / text)

    flags = ["--train_file", str(text), *shlex.split(f"{PRESETS[args.preset]} {COMMON} {args.extra}")]
    if args.model:
        flags = ["--model_name_or_path", args.model, *flags]
    launch = "accelerate launch --config_file configs/cpu_4_processes.yaml --main_process_port 0 scripts/finetune.py"
    cores = os.cpu_count() or 1
    one = run("1/2: one process", "python scripts/finetune.py", flags, output / "one_process", cores)
    flags += shlex.split(MESH)
    mesh = run("2/2: 4 processes, ulysses 2 x ring 2", launch, flags, output / "mesh_2x2", max(1, cores // 4))

    picture = HERE.parent / output / "losses.png"
    draw(one, mesh, f"{args.preset}: {args.model or 'a fresh Qwen3'}", picture)
    print(f"\n{table(one, mesh)}\n\npicture: {picture}")
    return verdict(one, mesh, args.tolerance)


if __name__ == "__main__":
    sys.exit(main())
