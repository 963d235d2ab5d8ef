"""Shared by the examples with TRL's trainers: flags, a model with its tokenizer, settings of every trainer, the log."""

from __future__ import annotations

import argparse
from typing import Any

import texts
import torch
from ending import end_process_groups
from train_accelerate import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

import hf_usp


def parse(description: str | None, steps: int, learning_rate: float) -> argparse.Namespace:
    """The flags of an example, with its defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", help="UTF-8 text files, from which prompts are cut")
    parser.add_argument("--model", help="a folder or a hub name; default: a fresh tiny Llama that reads bytes")
    parser.add_argument("--cp_size", type=int, default=1)
    parser.add_argument("--ulysses_degree", type=int)
    parser.add_argument("--prompt_length", type=int, default=400, help="characters of a prompt")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--learning_rate", type=float, default=learning_rate)
    return parser.parse_args()


def load(name: str | None) -> tuple[Any, Any]:
    """A model that attends by "usp", and its tokenizer."""
    if name is None:
        return tiny_llama(), texts.transformers_tokenizer()
    return AutoModelForCausalLM.from_pretrained(name, attn_implementation="usp"), AutoTokenizer.from_pretrained(name)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments that every trainer takes. The mesh is the only one that hf_usp asks for."""
    return {
        "parallelism_config": hf_usp.UspParallelismConfig(cp_size=args.cp_size, ulysses_degree=args.ulysses_degree),
        "max_steps": args.steps,
        "learning_rate": args.learning_rate,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available(),
    }


def train(trainer: Trainer, shown: dict[str, str]) -> None:
    """Train, and print the loss of each step beside the logged numbers `shown`, {name in the log: word}."""
    trainer.train()
    for log in trainer.state.log_history[:-1]:
        others = "".join(f" {word} {log[name]:.6f}" for name, word in shown.items())
        trainer.accelerator.print(f"step {log['step']} loss {log['loss']:.6f}{others}")
    end_process_groups()
