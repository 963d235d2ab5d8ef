"""GRPO with TRL's stock trainer: completions of long prompts, rewarded for letters. About a minute on 2 cores.

    accelerate launch --config_file configs/cpu_4_processes.yaml scripts/train_grpo.py README.md \
        --cp_size 4 --ulysses_degree 2
    python scripts/train_grpo.py README.md                (one process: the same rewards, 0.12 up to about 0.9)
    python scripts/train_grpo.py README.md --model models/SmolLM2-135M-Instruct --learning_rate 1e-4
"""

from __future__ import annotations

from typing import Any

import quiet  # noqa: F401
import texts
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl_example import load, parse, settings, train


def letters(completions: list[str], **_: Any) -> list[float | None]:
    """The share of lower-case letters of each completion."""
    return [sum(c.isascii() and c.islower() for c in text) / max(1, len(text)) for text in completions]


def main() -> None:
    args = parse(__doc__, steps=10, learning_rate=3e-2)
    model, tokenizer = load(args.model)
    text = "\n".join(texts.read_documents(args.text))
    starts = [i * (len(text) - args.prompt_length) // 32 for i in range(32)]
    prompts = Dataset.from_list([{"prompt": text[i : i + args.prompt_length]} for i in starts])
    config = GRPOConfig(
        output_dir="runs/grpo",
        # Of each data-parallel rank, as without a mesh: 16 completions, 8 of each prompt.
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=16,
        lr_scheduler_type="constant",
        **settings(args),
    )
    # A judge over a network would be asked by one rank of each mesh: reward_funcs=hf_usp.once(judge).
    trainer = GRPOTrainer(model, letters, config, train_dataset=prompts, processing_class=tokenizer)
    train(trainer, {"reward": "reward"})


if __name__ == "__main__":
    main()
