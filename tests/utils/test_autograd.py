"""Second derivatives: every backward of ours refuses them, on every rank, instead of leaving a part of them out."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import hf_usp
from hf_usp.distributed.loss import reduce_loss
from hf_usp.memory.chunked_loss import ChunkedLoss
from hf_usp.memory.tiled_mlp import tile_mlps
from hf_usp.recurrent.scan import exchange

from ..ranks import Ranks
from ..tiny import batch_of, tiny_model


def test_every_autograd_function_is_one_of_them() -> None:
    trees = [ast.parse(path.read_text()) for path in Path(hf_usp.__file__).parent.rglob("*.py")]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    functions = [node for node in classes if any("autograd.Function" in ast.unparse(base) for base in node.bases)]
    assert len(functions) >= 6
    for function in functions:
        backward = next(x for x in function.body if isinstance(x, ast.FunctionDef) and x.name == "backward")
        assert "forbid_double_backward" in map(ast.unparse, backward.decorator_list), function.name


def twice() -> dict[str, str]:
    """The message of a backward that is to be differentiated again, through each of our functions."""
    mesh = hf_usp.UspMesh.build(ring_degree=1, ulysses_degree=2)
    layout = hf_usp.shard(batch_of("plain"), mesh)["usp"]
    q = torch.randn(2, layout.local_length, 4, 8, requires_grad=True)

    def attend(x: torch.Tensor) -> torch.Tensor:
        return hf_usp.usp_attention(x, x, x, layout)

    def chunked(change: Callable[[Any], Any]) -> Callable[[torch.Tensor], torch.Tensor]:
        model = tiny_model(attention="eager")
        change(model)
        ids = batch_of("plain")["input_ids"]
        return lambda x: model(inputs_embeds=x.flatten(2), labels=ids[:, : x.shape[1]]).loss

    through: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "attention": attend,
        "operator": lambda x: checkpoint(attend, x, **hf_usp.save_attention_outputs()),
        "unshard": lambda x: hf_usp.unshard(x, layout),
        "exchange": lambda x: exchange(mesh.group, [[8, 8]], [[8, 8]], x.flatten()[:16])[0],
        "whole loss": lambda x: reduce_loss(x.sum(), mesh.group, 2),
        "loss in chunks": chunked(lambda model: ChunkedLoss(model, 7)),
        "MLP in chunks": chunked(lambda model: tile_mlps(model, 7)),
    }
    said = {}
    for name, function in through.items():
        total = function(q).sum()
        with pytest.raises(hf_usp.UspModelError) as error:
            torch.autograd.grad(total, q, create_graph=True)
        said[name] = str(error.value)
        dist.barrier()  # no rank is left in a message
        torch.autograd.grad(function(q).sum(), q)
    return said


def test_second_derivatives_are_refused(two_ranks: Ranks) -> None:
    for said in two_ranks.run(twice):
        assert len(said) == 7
        assert all("create_graph=True" in message for message in said.values())
