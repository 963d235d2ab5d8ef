"""A small Llama under the stock Trainer: this library beside Accelerate's own sequence parallelism, 1 to 4 processes.

    python benchmarks/train_step.py --peers build/peers  # 5 to 10 minutes; peers.py fills the folder

Every way trains the same model on the same rows; the losses say whether they train the same thing. Tokens per second is
wall time of the fastest step, CPU seconds those of the busiest process in it, memory the largest resident set of a
process over what it had before the model. `cp`: Accelerate's cp_size (torch, FSDP2). `sp`: its sp_backend="deepspeed".
Both expect GPUs; so that they run at all, Accelerate is told in their processes that the gloo run is a GPU run.
A way that still fails stands in the table with its error. Writes results/train_step-<date>.md, .json and .png.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from notes import machine_notes  # noqa: E402

ROWS = 16
# way, processes, ulysses degree
CASES = [
    ("plain", 1, 1),
    ("hf_usp", 1, 1),
    ("hf_usp", 2, 2),
    ("hf_usp", 2, 1),
    ("cp", 2, 1),
    ("sp", 2, 2),
    ("hf_usp", 4, 4),
    ("hf_usp", 4, 2),
    ("hf_usp", 4, 1),
    ("cp", 4, 1),
    ("sp", 4, 4),
]


# --- in a process of a run --------------------------------------------------------------------------------------------


def model_of(way: str) -> Any:
    """The same weights in every run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1 << 20,
        use_cache=False,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="usp" if way == "hf_usp" else "sdpa")


def rows_of(tokens: int) -> list[dict[str, list[int]]]:
    """Random rows, with the positions that DeepSpeed's Ulysses asks for."""
    rows = torch.randint(0, 4096, (ROWS, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": row, "position_ids": list(range(tokens))} for row in rows]


def take_for_gpus() -> None:
    """Accelerate refuses its own sequence parallelism on CPU processes: let it take this gloo run for a GPU run."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    def prepare_backend(self: Any, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        return "gloo", DistributedType.MULTI_GPU

    def set_device(self: Any) -> None:
        self.device = torch.device("cpu")

    PartialState._prepare_backend = prepare_backend
    PartialState.set_device = set_device
    os.environ.setdefault("ACCELERATE_BYPASS_DEVICE_MAP", "true")


def arguments_of(way: str, world: int, ulysses: int, steps: int, folder: str) -> Any:
    """The differences between the ways."""
    from accelerate import ParallelismConfig
    from transformers import TrainingArguments

    more: dict[str, Any] = {"use_cpu": True}
    if way == "hf_usp":
        import hf_usp

        more["parallelism_config"] = hf_usp.UspParallelismConfig(cp_size=world, ulysses_degree=ulysses)
    elif way == "sp":
        from accelerate.utils import DeepSpeedSequenceParallelConfig

        handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation="sdpa")
        more = {"parallelism_config": ParallelismConfig(sp_size=world, sp_backend="deepspeed", sp_handler=handler)}
        more["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "train_batch_size": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 0},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "zero_allow_untested_optimizer": True,
        }
    elif way == "cp":
        more = {"parallelism_config": ParallelismConfig(cp_size=world)}
        more["fsdp"], more["fsdp_config"] = "full_shard auto_wrap", {"fsdp_version": 2}
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=1,
        max_steps=steps,
        logging_steps=1,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
        lr_scheduler_type="constant",
        **more,
    )


def run_main(args: argparse.Namespace) -> None:
    way, world, ulysses = args.way, int(os.environ["WORLD_SIZE"]), args.ulysses
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.path.append(str(args.peers))
    if way in ("cp", "sp"):
        take_for_gpus()
    from transformers import Trainer, TrainerCallback

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    marks: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            marks.append((time.perf_counter(), time.process_time()))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append((time.perf_counter(), time.process_time()))

    arguments = arguments_of(way, world, ulysses, args.steps, str(args.report.parent / "out"))
    trainer = Trainer(model=model_of(way), args=arguments, train_dataset=rows_of(args.tokens), callbacks=[Clock()])
    trainer.train()
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(marks[::2], marks[1::2], strict=True)]
    kept = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "wall": min(wall for wall, _ in steps[1:]),
        "cpu": min(cpu for _, cpu in steps[1:]),
        "memory": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024,
    }
    args.report.with_suffix(f".{os.environ['RANK']}.json").write_text(json.dumps(kept))


# --- outside ----------------------------------------------------------------------------------------------------------


def run_case(case: tuple[str, int, int], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Start the processes of one way and put together what they wrote, or how they failed."""
    way, world, ulysses = case
    report = folder / f"{way}-{world}-{ulysses}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--way", way, "--ulysses", str(ulysses), "--report", str(report)]
    command += ["--tokens", str(args.tokens), "--steps", str(args.steps), "--peers", str(args.peers)]
    logs, processes = [], []
    try:
        for rank in range(world):
            environment = (
                os.environ
                | {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world),
                    "LOCAL_WORLD_SIZE": str(world),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "OMP_NUM_THREADS": "1",
                    "HF_HUB_OFFLINE": "1",
                }
                | ({"DS_ACCELERATOR": "cpu", "DS_SKIP_CUDA_CHECK": "1"} if way == "sp" else {})
            )
            log = report.with_suffix(f".{rank}.log").open("w+")
            logs.append(log)
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        deadline = time.monotonic() + args.limit
        failed = False
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline and not failed:
            failed = any(p.poll() for p in processes)
            time.sleep(0.2)
        time.sleep(3.0 if failed else 0.0)  # the others say why, too
    finally:
        for process in processes:
            process.kill()
            process.wait()
    line: dict[str, Any] = {"way": way, "processes": world, "mesh": f"{world // ulysses}x{ulysses}"}
    reports = [report.with_suffix(f".{rank}.json") for rank in range(world)]
    if not all(path.exists() for path in reports):
        return line | {"failed": _last_error(logs)}
    ranks = [json.loads(path.read_text()) for path in reports]
    wall = max(rank["wall"] for rank in ranks)
    return line | {
        "tokens_per_second": args.tokens / wall,
        "cpu": max(rank["cpu"] for rank in ranks),
        "memory": max(rank["memory"] for rank in ranks),
        "losses": ranks[0]["losses"],
    }


def _last_error(logs: list[Any]) -> str:
    """The last line of the first log that ends in an error."""
    for log in logs:
        log.seek(0)
        errors = [line.strip() for line in log if "Error" in line and not line.startswith(" ")]
        if errors:
            return errors[-1][:300]
    return "no answer within the limit"


def as_table(lines: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = [
        "way",
        "processes",
        "ring x ulysses",
        "tokens/s",
        "CPU s a step, busiest",
        "memory, MiB",
        "first and last loss",
    ]
    rows = [head, ["---"] * len(head)]
    for line in lines:
        start = [line["way"], str(line["processes"]), line["mesh"]]
        if "failed" in line:
            rows.append([*start, "-", "-", "-", f"does not run: {line['failed']}"])
            continue
        rows.append([*start, f"{line['tokens_per_second']:.0f}", f"{line['cpu']:.3f}", f"{line['memory'] / 2**20:.0f}"])
        rows[-1].append(f"{line['losses'][0]:.5f}, {line['losses'][-1]:.5f}")
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw(lines: list[dict[str, Any]], file: Path) -> None:
    """CPU time and memory of the ways that ran."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ran = [line for line in lines if "failed" not in line]
    names = [f"{line['way']} {line['mesh']}" for line in ran]
    colours = ["#1b7f5c" if line["way"] == "hf_usp" else "#8a97a6" for line in ran]
    figure, sides = pyplot.subplots(1, 2, figsize=(11, 0.35 * len(ran) + 1.2), sharey=True, layout="constrained")
    for axes, (key, scale, title) in zip(
        sides, [("cpu", 1, "CPU seconds a step, busiest process"), ("memory", 2**20, "memory, MiB")], strict=True
    ):
        axes.bar_label(
            axes.barh(range(len(ran)), [line[key] / scale for line in ran], color=colours), fmt="%.2f", fontsize=8
        )
        axes.set_yticks(range(len(ran)), names, fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    sides[0].invert_yaxis()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--limit", type=float, default=240.0, help="most seconds for one way")
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), help="folder with DeepSpeed, see peers.py")
    parser.add_argument("--output", type=Path, default=Path("results"))
    # Of a process of a run.
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--ulysses", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way is not None:
        run_main(args)
        return
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            lines.append(run_case(case, args, Path(folder)))
            print(f"  {case[0]}, {case[1]} processes, ulysses {case[2]}: {lines[-1].get('failed', 'done')}", flush=True)
    notes = machine_notes(f"python benchmarks/train_step.py --tokens {args.tokens} --steps {args.steps}")
    sizes = (
        f"Llama of 4 layers, width 256, 8 query and 4 kv heads, vocabulary 4,096, fp32; one row of {args.tokens} tokens"
    )
    text = "\n\n".join(["# A training step under the stock Trainer", *notes.values(), sizes, as_table(lines)])
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"train_step-{date.today().isoformat()}"
    stem.with_suffix(".md").write_text(text + "\n")
    stem.with_suffix(".json").write_text(json.dumps(notes | {"lines": lines}, indent=1))
    draw(lines, stem.with_suffix(".png"))
    print(f"{text}\n\nwritten to {stem}.md, .json and .png")


if __name__ == "__main__":
    main()
