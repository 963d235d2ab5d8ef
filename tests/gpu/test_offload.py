"""Checkpoints in CPU memory on a real device: the gradients of those that stayed, at a lower peak."""

from __future__ import annotations

import pytest
import torch

from hf_usp.memory.activation_offload import offload_checkpoints

from ..tiny import largest_difference, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("device")]


def test_gradients_and_peak() -> None:
    model = tiny_model(attention="sdpa", num_hidden_layers=12, hidden_size=256, intermediate_size=256).cuda().train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    ids = torch.randint(3, 64, (1, 16384), device="cuda")
    results, peaks = [], []
    for offloaded in (False, True):
        if offloaded:
            offload_checkpoints(model)
        for _ in range(2):
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        results.append({name: p.grad.cpu() for name, p in model.named_parameters()})
        peaks.append(torch.cuda.max_memory_allocated())
    assert largest_difference(results[1], results[0]) < 1e-6
    # Of twelve inputs of 16 MiB two or three are on the device at once.
    assert peaks[1] < peaks[0] - 7 * 16384 * 256 * 4
