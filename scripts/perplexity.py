"""Perplexity of one long text under a model, its tokens spread over processes, and the loss by position as a picture.

torchrun --standalone --nproc_per_node 4 scripts/perplexity.py book.txt --model models/SmolLM2-135M-Instruct \
    --tokens 8192 --ring_degree 2 --ulysses_degree 2 --output runs/perplexity.png
python scripts/perplexity.py book.txt --model Qwen/Qwen3-0.6B           (one process: the same numbers)

Every token is predicted from all tokens before it, with no window; tokens beyond --tokens are left out. The curve shows
whether a model still uses its context at the end: it falls as long as more text before helps.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path

import texts
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_usp

AT_ONCE = 1024  # tokens whose logits are held in fp32 at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", help="UTF-8 text files, read one after the other")
    parser.add_argument("--model", required=True, help="a folder or a hub name")
    parser.add_argument("--tokenizer", help="default: the model's; 'bytes': no tokenizer, ids 0 to 256")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dtype", default="auto", help="of the weights; auto: that of the checkpoint")
    parser.add_argument("--ring_degree", type=int, default=1)
    parser.add_argument("--ulysses_degree", type=int, default=1)
    parser.add_argument("--output", default="runs/perplexity.png", help="the picture; numbers stand beside it as .json")
    args = parser.parse_args()

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
    if gpu:  # before the group: NCCL, and "cuda" without a number, mean the current device
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if gpu else "gloo")
    else:  # no launcher: a group of one
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    mesh = hf_usp.UspMesh.build(ring_degree=args.ring_degree, ulysses_degree=args.ulysses_degree)
    name = args.tokenizer or args.model
    tokenizer = texts.ByteTokenizer() if name == "bytes" else AutoTokenizer.from_pretrained(name)
    text = "\n".join(texts.read_documents(args.text))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: args.tokens]
    model = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation="usp", dtype=args.dtype)
    hf_usp.shard_recurrent_layers(model)
    torch.nn.Module.to(model.eval(), device)
    losses = token_losses(model, torch.as_tensor(ids, device=device)[None], mesh)
    if dist.get_rank() == 0:
        report(losses[:-1], Path(args.output))  # nothing follows the last token
    dist.destroy_process_group()


@torch.no_grad()
def token_losses(model: PreTrainedModel, ids: torch.Tensor, mesh: hf_usp.UspMesh) -> torch.Tensor:
    """Loss of predicting each token's successor [tokens], on every process; the last has none and is 0."""
    share = hf_usp.shard({"input_ids": ids, "labels": ids}, mesh)
    layout, labels = share["usp"], share.pop("labels")
    for name in ("shift_labels", "num_items_in_batch"):
        share.pop(name)
    logits = model(**share, use_cache=False).logits
    parts = [
        torch.nn.functional.cross_entropy(part.float(), targets, reduction="none")
        for part, targets in zip(logits[0].split(AT_ONCE), labels[0].split(AT_ONCE), strict=True)
    ]
    return hf_usp.unshard(torch.cat(parts)[None], layout)[0]


def report(losses: torch.Tensor, path: Path) -> None:
    """Print the perplexity, and write the curve of loss by position as a picture and as numbers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    losses = losses.double().cpu()
    mean = losses.mean().item()
    print(f"{len(losses)} tokens predicted, loss {mean:.6f}, perplexity {math.exp(mean):.3f}", flush=True)
    edges = sorted({min(len(losses), 2**power) for power in range(5, 40)})
    bins = [(a, b, losses[a:b].mean().item()) for a, b in zip([0, *edges[:-1]], edges, strict=True) if b > a]
    for start, stop, value in bins:
        print(f"  tokens {start:>8,} to {stop:>8,}   loss {value:.4f}")
    window = max(1, len(losses) // 64)
    smooth = losses.unfold(0, window, window).mean(1)
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    axes.plot([(i + 0.5) * window for i in range(len(smooth))], smooth)
    axes.set(xlabel="position in the text, tokens", ylabel=f"loss, mean of {window} tokens")
    axes.set_title(f"perplexity {math.exp(mean):.2f} over {len(losses):,} tokens")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    numbers = {"tokens": len(losses), "loss": mean, "perplexity": math.exp(mean), "loss_by_position": bins}
    path.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
