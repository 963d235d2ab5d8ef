"""A training loop written by hand with Accelerate: full batches in, the whole batch's loss out. A few seconds.

    accelerate launch --config_file configs/cpu_4_processes.yaml scripts/train_accelerate.py README.md \
        --cp_size 4 --ulysses_degree 2
    python scripts/train_accelerate.py README.md          (one process: the same losses, 5.7 down to about 4)
"""

from __future__ import annotations

import argparse
from typing import Any

import texts
import torch
from accelerate import Accelerator
from ending import end_process_groups
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import hf_usp


def tiny_llama() -> PreTrainedModel:
    """A fresh model of 3 query heads and 1 kv head that reads bytes; the same on every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="usp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", help="UTF-8 text files")
    parser.add_argument("--cp_size", type=int, default=1)
    parser.add_argument("--ulysses_degree", type=int)
    parser.add_argument("--sequence_length", type=int, default=500)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()

    parallelism = None
    if args.cp_size > 1:
        parallelism = hf_usp.UspParallelismConfig(cp_size=args.cp_size, ulysses_degree=args.ulysses_degree)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), parallelism_config=parallelism)

    rows = texts.full_rows(texts.read_documents(args.text), args.sequence_length)
    endless: Any = [rows[i % len(rows)] for i in range(2 * args.steps)]
    loader: DataLoader[Any] = DataLoader(endless, batch_size=2)
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    for step, batch in enumerate(loader, start=1):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step} loss {loss.item():.6f}")
    end_process_groups()


if __name__ == "__main__":
    main()
