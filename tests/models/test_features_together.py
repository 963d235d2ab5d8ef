"""Ways to save memory beside layers that need more than attention, and beside generation: exact, and said."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist

import hf_usp

from ..ranks import Ranks
from .census import tiny_model
from .verdict import TOLERANCE, step

# Families whose layers select, compress, look back or recur; of each what their layers say for computing all tokens.
FAMILIES = ["deepseek_v32", "glm_moe_dsa", "qwen4_exp_text", "deepseek_v4", "zaya", "recurrent_gemma"]


def in_chunks(family: str) -> tuple[float, list[str]]:
    """The error of a step with layers in chunks of 4 of 16 local tokens, and the log."""
    said: list[str] = []
    logger = logging.getLogger("hf_usp.memory.tiled_layer")
    logger.setLevel(logging.INFO)
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    reference, model = (tiny_model(family, attention).train() for attention in ("eager", "usp"))
    mesh = hf_usp.UspMesh.build(ring_degree=2, ulysses_degree=1)
    hf_usp.apply_context_parallel(model, mesh, layer_chunk_size=4, head_groups=2, gather_outputs=True)
    expected, got = step(reference, "plain"), step(model, "plain")
    got.average_gradients()
    logger.removeHandler(handler)
    return expected.largest_error(got), said if dist.get_rank() == 0 else ["computes all tokens"]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_in_chunks_leave_layers_alone_that_need_other_tokens(two_ranks: Ranks, family: str) -> None:
    for error, said in two_ranks.run(in_chunks, family):
        assert error < TOLERANCE
        assert any("computes all tokens" in line for line in said), said


def generated(sharded: bool) -> torch.Tensor:
    """Tokens after a prompt of 41, on two ranks with every way to save memory, or in one process."""
    model = tiny_model("qwen3", "usp" if sharded else "eager").eval()
    if sharded:
        mesh = hf_usp.UspMesh.build(ring_degree=2, ulysses_degree=1)
        hf_usp.apply_context_parallel(
            model, mesh, generate="sharded", layer_chunk_size=4, head_groups=2, mlp_chunk_size=4, loss_chunk_size=4
        )
    ids = torch.randint(3, 60, (2, 41), generator=torch.Generator().manual_seed(0))
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None
    )


def test_generation_beside_layers_in_chunks(two_ranks: Ranks) -> None:
    expected = generated(False)
    assert all(torch.equal(mine, expected) for mine in two_ranks.run(generated, True))
