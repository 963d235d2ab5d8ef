"""GRPO with TRL's stock trainer: completions of long prompts, rewarded for letters. About a minute on 2 cores.

    accelerate launch --config_file configs/cpu_4_processes.yaml scripts/train_grpo.py README.md \
        --cp_size 4 --ulysses_degree 2
    python scripts/train_grpo.py README.md                (one process: the same rewards, 0.12 up to about 0.9)
    python scripts/train_grpo.py README.md --model models/SmolLM2-135M-Instruct --learning_rate 1e-4
"""

from __future__ import annotations

import argparse
from typing import Any

import quiet  # noqa: F401
import texts
import torch
from datasets import Dataset
from ending import end_process_groups
from train_accelerate import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import hf_usp


def letters(completions: list[str], **_: Any) -> list[float | None]:
    """The share of lower-case letters of each completion."""
    return [sum(c.isascii() and c.islower() for c in text) / max(1, len(text)) for text in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", help="UTF-8 text files, from which prompts are cut")
    parser.add_argument("--model", help="a folder or a hub name; default: a fresh tiny Llama that reads bytes")
    parser.add_argument("--cp_size", type=int, default=1)
    parser.add_argument("--ulysses_degree", type=int)
    parser.add_argument("--prompt_length", type=int, default=400, help="characters of a prompt")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--learning_rate", type=float, default=3e-2)
    args = parser.parse_args()

    model: Any
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation="usp")
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    else:
        model, tokenizer = tiny_llama(), texts.transformers_tokenizer()
    text = "\n".join(texts.read_documents(args.text))
    starts = [i * (len(text) - args.prompt_length) // 32 for i in range(32)]
    prompts = Dataset.from_list([{"prompt": text[i : i + args.prompt_length]} for i in starts])

    settings = GRPOConfig(
        output_dir="runs/grpo",
        parallelism_config=hf_usp.UspParallelismConfig(cp_size=args.cp_size, ulysses_degree=args.ulysses_degree),
        # Of each data-parallel rank, as without a mesh: 16 completions, 8 of each prompt.
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=16,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
    )
    # A judge over a network would be asked by one rank of each mesh: reward_funcs=hf_usp.once(judge).
    trainer = GRPOTrainer(model, letters, settings, train_dataset=prompts, processing_class=tokenizer)
    trainer.train()
    for log in trainer.state.log_history[:-1]:
        trainer.accelerator.print(f"step {log['step']} loss {log['loss']:.6f} reward {log['reward']:.6f}")
    end_process_groups()


if __name__ == "__main__":
    main()
