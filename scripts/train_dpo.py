"""DPO with TRL's stock trainer: the true continuation of a text against a shuffled one. About a minute on 2 cores.

    accelerate launch --config_file configs/cpu_4_processes.yaml scripts/train_dpo.py README.md \
        --cp_size 4 --ulysses_degree 2
    python scripts/train_dpo.py README.md                 (one process: the same losses, from 0.69 down)
    python scripts/train_dpo.py README.md --model models/SmolLM2-135M-Instruct --learning_rate 1e-5
"""

from __future__ import annotations

import copy
import random

import quiet  # noqa: F401
import texts
from datasets import Dataset
from trl import DPOConfig, DPOTrainer
from trl_example import load, parse, settings, train


def preferences(text: str, prompt: int, completion: int) -> Dataset:
    """16 prompts with what follows in the text, and with the same characters in another order."""
    rows, draw = [], random.Random(0)
    for i in range(16):
        start = i * (len(text) - prompt - completion) // 16
        chosen = text[start + prompt : start + prompt + completion]
        rejected = "".join(draw.sample(chosen, len(chosen)))
        rows.append({"prompt": text[start : start + prompt], "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(rows)


def main() -> None:
    args = parse(__doc__, steps=8, learning_rate=1e-3)
    model, tokenizer = load(args.model)
    config = DPOConfig(
        output_dir="runs/dpo",
        per_device_train_batch_size=2,  # of each data-parallel rank, as without a mesh
        max_length=None,
        **settings(args),
    )
    pairs = preferences("\n".join(texts.read_documents(args.text)), args.prompt_length, completion=100)
    reference = copy.deepcopy(model)  # is sharded, too
    trainer = DPOTrainer(model, reference, config, train_dataset=pairs, processing_class=tokenizer)
    train(trainer, {"rewards/margins": "margin"})


if __name__ == "__main__":
    main()
