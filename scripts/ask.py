"""An answer from a document of any length, whose keys and values are sharded over processes.

torchrun --standalone --nproc_per_node 4 scripts/ask.py book.txt --question "Who stole the letter?" \
    --model models/SmolLM2-135M-Instruct --ring_degree 2 --ulysses_degree 2
python scripts/ask.py book.txt --question "Who stole the letter?" --model Qwen/Qwen3-0.6B    (one process)

For a model on the machines that trained it. A service with many users is vLLM's work (docs/generation.md).
"""

from __future__ import annotations

import argparse
from typing import Any

import generating
import texts
import torch
import torch.distributed as dist


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", help="UTF-8 text files, read one after the other")
    parser.add_argument("--question", required=True, nargs="+", help="one or several, each asked after the last answer")
    generating.add_flags(parser)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    args = parser.parse_args()

    model, tokenizer, mesh = generating.load(args)
    text = "\n".join(texts.read_documents(args.text))
    ids: list[int] = []
    kept: dict[str, Any] = {}
    for question in args.question:
        # The document is read once: its keys stay for the next question.
        asked = f"{'' if ids else text}\n\nQuestion: {question}\nAnswer:"
        ids += tokenizer(asked, add_special_tokens=not ids, verbose=False)["input_ids"]
        given = torch.tensor([ids], device=model.device)
        out = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=args.max_new_tokens,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            **kept,
        )
        kept = {name: out[name] for name in ("cache", "past_key_values") if out.get(name) is not None}
        if mesh.rank == 0:
            print(
                f"{len(ids):,} tokens. {question}{tokenizer.decode(out.sequences[0, len(ids) :].tolist())}", flush=True
            )
        ids = out.sequences[0].tolist()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
