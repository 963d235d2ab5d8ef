"""Shared by the scripts that generate: flags of the model and its mesh, and the model prepared on it."""

from __future__ import annotations

import argparse
import os
from typing import Any

import texts
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_usp


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The model, its tokenizer and the degrees of the mesh."""
    parser.add_argument("--model", required=True, help="a folder or a hub name")
    parser.add_argument("--tokenizer", help="default: the model's; 'bytes': no tokenizer, ids 0 to 256")
    parser.add_argument("--ring_degree", type=int, default=1)
    parser.add_argument("--ulysses_degree", type=int, default=1)


def load(args: argparse.Namespace) -> tuple[Any, Any, hf_usp.UspMesh]:
    """Model, tokenizer and mesh, on this process's device; prompts are sharded. It starts the process group."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if gpu else "gloo")
    name = args.tokenizer or args.model
    tokenizer = texts.ByteTokenizer() if name == "bytes" else AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation="usp").eval()
    mesh = hf_usp.UspMesh.build(ring_degree=args.ring_degree, ulysses_degree=args.ulysses_degree)
    hf_usp.apply_context_parallel(torch.nn.Module.to(model, device), mesh, generate="sharded")
    return model, tokenizer, mesh
