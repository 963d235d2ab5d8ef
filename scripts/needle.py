"""Needle in a haystack: does a model find a fact at any depth of a long prompt? As a script and as a Trainer callback.

torchrun --standalone --nproc_per_node 4 scripts/needle.py --model models/SmolLM2-135M-Instruct --lengths 512 1024 \
    --ring_degree 2 --ulysses_degree 2 --output runs/needle.png

The prompt's keys and values are sharded over the processes (docs/generation.md). Texts are made here, three tasks after
RULER (arXiv 2404.06654): "needle" (one fact), "keys" (the same fact of many cities, one of them asked for) and "hops"
(a chain of names, each equal to the one before).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import generating
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from hf_usp.errors import UspError

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
CITIES = ("Paris", "Lima", "Oslo", "Cairo", "Quito", "Rome", "Accra", "Delhi", "Osaka", "Perth", "Riga", "Lagos")
TASKS = ("needle", "keys", "hops")


class NeedleError(UspError):
    """A grid that cannot be made."""


def make_task(task: str, seed: int) -> tuple[list[str], str, str]:
    """The facts to hide, in their order, the question, and its answer."""
    draw = random.Random(f"{task} {seed}")
    cities = draw.sample(CITIES, len(CITIES) if task == "keys" else 4)
    numbers = [str(draw.randrange(10_000, 100_000)) for _ in cities]
    if task == "hops":
        facts = [f"The number of {cities[0]} is {numbers[0]}. "]
        facts += [f"The number of {b} is that of {a}. " for a, b in zip(cities, cities[1:], strict=False)]
        return facts, f"\nThe number of {cities[-1]} is", numbers[0]
    facts = [f"The number of {city} is {number}. " for city, number in zip(cities, numbers, strict=True)]
    asked = draw.randrange(len(facts)) if task == "keys" else 0
    return facts if task == "keys" else facts[:1], f"\nThe number of {cities[asked]} is", numbers[asked]


def make_prompt(tokenizer: Any, task: str, length: int, depth: float, seed: int) -> tuple[list[int], str]:
    """A prompt of `length` tokens, and its answer. The first fact stands at `depth` of the filler, others behind it."""
    facts, question, answer = make_task(task, seed)
    hidden = [_ids(tokenizer, fact) for fact in facts]
    asked, filler = _ids(tokenizer, question), _ids(tokenizer, FILLER)
    room = length - len(asked) - sum(map(len, hidden))
    if room < 0:
        raise NeedleError(
            f"prompts of {length} tokens for the task {task!r}, whose facts and question take {length - room}",
            rule="a prompt holds its facts and its question",
            remedy="choose longer --lengths",
        )
    hay = (filler * (room // len(filler) + 1))[:room]
    edges = [int((depth + (1 - depth) * i / len(hidden)) * room) for i in range(len(hidden))] + [room]
    found = hay[: edges[0]]
    for fact, start, stop in zip(hidden, edges, edges[1:], strict=False):
        found += fact + hay[start:stop]
    return found + asked, answer


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def needle_grid(
    model: Any, tokenizer: Any, lengths: Sequence[int], depths: Sequence[float], task: str = "needle", samples: int = 2
) -> dict[tuple[int, float], float]:
    """The share of right answers for each length and depth. The model is in evaluation mode meanwhile."""
    training, grid = model.training, {}
    model.eval()
    for length in lengths:
        for depth in depths:
            made = [make_prompt(tokenizer, task, length, depth, seed) for seed in range(samples)]
            ids = torch.tensor([prompt for prompt, _ in made], device=model.device)
            most = max(len(_ids(tokenizer, " " + answer)) for _, answer in made) + 2
            tokens = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False, pad_token_id=0
            )
            said = [tokenizer.decode(row[length:].tolist()) for row in tokens]
            grid[length, depth] = sum(answer in text for text, (_, answer) in zip(said, made, strict=True)) / samples
    model.train(training)
    return grid


class NeedleCallback(TrainerCallback):
    """Runs the grid every `every` steps of a Trainer, and logs `needle_LENGTH_DEPTH`.

    The Trainer's config wants `UspParallelismConfig(generate="sharded")`, or "auto". Under FSDP2 and ZeRO-3 weights are
    gathered for every token.
    """

    def __init__(self, trainer: Any, tokenizer: Any, every: int, **grid: Any) -> None:
        self.trainer, self.tokenizer, self.every, self.grid = trainer, tokenizer, every, grid

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            model = self.trainer.accelerator.unwrap_model(self.trainer.model)
            found = needle_grid(model, self.tokenizer, **self.grid)
            self.trainer.log({f"needle_{length}_{depth:g}": right for (length, depth), right in found.items()})


def report(grid: dict[tuple[int, float], float], task: str, path: Path) -> None:
    """Print the grid, and write it as a picture and as numbers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths, depths = sorted({length for length, _ in grid}), sorted({depth for _, depth in grid})
    print("depth " + "".join(f"{length:>9,}" for length in lengths), flush=True)
    for depth in depths:
        print(f"{depth:5.0%} " + "".join(f"{grid[length, depth]:9.0%}" for length in lengths), flush=True)
    figure, axes = pyplot.subplots(figsize=(1.5 + len(lengths), 1 + 0.5 * len(depths)), layout="constrained")
    image = axes.imshow([[grid[n, d] for n in lengths] for d in depths], vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
    axes.set(xlabel="prompt, tokens", ylabel="depth of the fact", title=f"right answers, {task}")
    figure.colorbar(image)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    numbers = [{"length": n, "depth": d, "right": right} for (n, d), right in grid.items()]
    path.with_suffix(".json").write_text(json.dumps({"task": task, "grid": numbers}, indent=1) + "\n")
    print(f"picture: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    generating.add_flags(parser)
    parser.add_argument("--task", choices=TASKS, default="needle")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--depths", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--output", default="runs/needle.png", help="the picture; numbers stand beside it as .json")
    args = parser.parse_args()

    model, tokenizer, mesh = generating.load(args)
    grid = needle_grid(model, tokenizer, args.lengths, args.depths, args.task, args.samples)
    if mesh.rank == 0:
        report(grid, args.task, Path(args.output))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
