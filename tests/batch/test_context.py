"""A layout never changes; one function reads every carrier of a context, and copies of a handle carry nothing."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch

import hf_usp
from hf_usp.batch.context import ForwardContext, ShardOptions
from hf_usp.batch.layout import CAUSAL, make_layout
from hf_usp.batch.shard import begin_forward
from hf_usp.batch.sharded_tensors import ContextMask, ShardedMask, context_of, make_handle
from hf_usp.kernels.eager import EagerKernel
from hf_usp.sharding.masks import Documents

MESH = hf_usp.UspMesh.build(ring_degree=1, ulysses_degree=1)
BATCH = {"input_ids": torch.ones(2, 6, dtype=torch.long)}


def test_a_layout_never_changes() -> None:
    layout = make_layout(Documents.from_bounds([0, 6, 12]), 2, 6, MESH)
    for name in ("order", "kernel", "shards", "calls"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(layout, name, None)
    assert layout.ring_schedule() is layout.ring_schedule(CAUSAL), "a schedule is made once"


def test_every_carrier_is_read() -> None:
    context = begin_forward(BATCH, MESH, ShardOptions())
    handle = make_handle(context)
    mask = ContextMask.of(torch.ones(2, 6, dtype=torch.bool), handle)
    sharded = ShardedMask(handle, CAUSAL)
    for carrier in (context, handle, mask, mask.long(), sharded, {"full_attention": sharded}):
        assert context_of(None, torch.ones(2), context.layout, carrier) is context, type(carrier)
    for value in (None, torch.ones(2), handle.clone(), mask * 2, mask.as_subclass(torch.Tensor), {"mask": None}, "usp"):
        assert context_of(value) is None, value
    assert context_of(pickle.loads(pickle.dumps(mask))) is not context


def test_a_layout_alone_is_that_of_a_hand_written_loop() -> None:
    share = hf_usp.shard(BATCH, MESH)
    context = context_of(*share.values())
    assert context is not None and context.manual_loop and context.layout is share["usp"]
    alone = context_of(share["usp"])
    assert alone is not None and alone.manual_loop and alone is not context and alone.layout is share["usp"]
    assert not begin_forward(BATCH, MESH, ShardOptions()).manual_loop


def test_forwards_over_one_layout_are_counted_apart() -> None:
    """Also those of a caller, who has the layout alone and gets the kernel that the layout names."""
    layout = hf_usp.shard(BATCH, MESH, kernel="eager")["usp"]
    first, second = ForwardContext(layout), ForwardContext(layout)
    first.recurrent_calls += 1
    assert first.reached_a_layer and not second.reached_a_layer
    q, seen, stock = torch.randn(2, 6, 2, 4), [], EagerKernel.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EagerKernel, "forward", lambda *args: seen.append(1) or stock(*args))
        hf_usp.usp_attention(q, q, q, layout)
    assert seen and not second.reached_a_layer


def test_shift_labels_are_noticed() -> None:
    labels = {"labels": BATCH["input_ids"]}
    assert not begin_forward(BATCH | labels, MESH, ShardOptions()).has_shift_labels
    assert begin_forward(BATCH | {"shift_labels": BATCH["input_ids"]}, MESH, ShardOptions()).has_shift_labels
