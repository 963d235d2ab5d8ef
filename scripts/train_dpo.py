"""DPO with TRL's stock trainer: the true continuation of a text against a shuffled one. About a minute on 2 cores.

    accelerate launch --config_file configs/cpu_4_processes.yaml scripts/train_dpo.py README.md \
        --cp_size 4 --ulysses_degree 2
    python scripts/train_dpo.py README.md                 (one process: the same losses, from 0.69 down)
    python scripts/train_dpo.py README.md --model models/SmolLM2-135M-Instruct --learning_rate 1e-5
"""

from __future__ import annotations

import argparse
import copy
import random
from typing import Any

import quiet  # noqa: F401
import texts
import torch
from datasets import Dataset
from ending import end_process_groups
from train_accelerate import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import hf_usp


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", help="UTF-8 text files")
    parser.add_argument("--model", help="a folder or a hub name; default: a fresh tiny Llama that reads bytes")
    parser.add_argument("--cp_size", type=int, default=1)
    parser.add_argument("--ulysses_degree", type=int)
    parser.add_argument("--prompt_length", type=int, default=400, help="characters of a prompt")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    args = parser.parse_args()

    model: Any
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation="usp")
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    else:
        model, tokenizer = tiny_llama(), texts.transformers_tokenizer()

    settings = DPOConfig(
        output_dir="runs/dpo",
        parallelism_config=hf_usp.UspParallelismConfig(cp_size=args.cp_size, ulysses_degree=args.ulysses_degree),
        per_device_train_batch_size=2,  # of each data-parallel rank, as without a mesh
        max_length=None,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
    )
    pairs = preferences("\n".join(texts.read_documents(args.text)), args.prompt_length, completion=100)
    reference = copy.deepcopy(model)  # is sharded, too
    trainer = DPOTrainer(model, reference, settings, train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    for log in trainer.state.log_history[:-1]:
        trainer.accelerator.print(f"step {log['step']} loss {log['loss']:.6f} margin {log['rewards/margins']:.6f}")
    end_process_groups()


if __name__ == "__main__":
    main()
