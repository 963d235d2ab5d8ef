"""A training loop with nothing but torch and hf_usp: build the mesh, pass full batches, average the gradients. Seconds.

torchrun --standalone --nproc_per_node 4 scripts/train_plain.py README.md --ring_degree 2 --ulysses_degree 2
python scripts/train_plain.py README.md               (one process: the same losses, 5.7 down to about 4)
"""

from __future__ import annotations

import argparse
import os

import texts
import torch
import torch.distributed as dist
from torch.utils.data import default_collate
from train_accelerate import tiny_llama

import hf_usp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", help="UTF-8 text files")
    parser.add_argument("--ring_degree", type=int, default=1)
    parser.add_argument("--ulysses_degree", type=int, default=1)
    parser.add_argument("--sequence_length", type=int, default=500)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()

    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:  # no launcher: a group of one
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    mesh = hf_usp.UspMesh.build(ring_degree=args.ring_degree, ulysses_degree=args.ulysses_degree)

    rows = texts.full_rows(texts.read_documents(args.text), args.sequence_length)
    model = hf_usp.apply_context_parallel(tiny_llama(), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    for step in range(args.steps):
        # Every process of a mesh passes the same full batch; with several meshes each would pass its own.
        batch = default_collate([rows[(2 * step + i) % len(rows)] for i in range(2)])
        loss = model(**batch).loss
        loss.backward()
        # The loss is that of the full batch; gradients are, too, after an average over all processes (DDP does that).
        for gradient in (weight.grad for weight in model.parameters() if weight.grad is not None):
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step + 1} loss {loss.item():.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
