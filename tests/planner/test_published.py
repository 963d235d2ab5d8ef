"""Whole steps that others have published, beside the prediction; rates of kernels; MFU as the report counts it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hf_usp.errors import UspConfigError
from hf_usp.planner.hardware import MACHINES, WORKSPACES, Link
from hf_usp.planner.roofline import attention, mask_area, predict
from hf_usp.planner.workload import Degrees, ModelShape, TrainingStep

from .recipes import QWEN3_8B, others

H100 = MACHINES["h100-nvlink"]


def test_published_steps_are_predicted_from_published_rates() -> None:
    """TRL's within 10 %, each too short; UPipe's, which does more than plain checkpointing, within 30 %."""
    ratios = {run: it.seconds / run.seconds for run, it, _ in others()}
    far = {run: ratio for run, ratio in ratios.items() if not (0.9 if run.who == "TRL" else 0.7) < ratio < 1}
    assert len(ratios) >= 9 and not far


def test_the_kernel_makes_the_difference_that_was_published() -> None:
    """606 s with FlashAttention 2, 373 s with cuDNN, 21.4 % and 34.7 % MFU, in the same run."""
    runs = {run.kernel: (run, it) for run, it, _ in others() if (run.model, run.tokens) == ("Qwen3 8B", 1 << 20)}
    (slow, slowly), (fast, quickly) = runs["fa2"], runs["cudnn"]
    assert slowly.seconds / quickly.seconds == pytest.approx(slow.seconds / fast.seconds, rel=0.01)
    assert quickly.mfu * quickly.seconds / fast.seconds == pytest.approx(0.347, abs=0.002)
    assert slowly.mfu * slowly.seconds / slow.seconds == pytest.approx(0.214, abs=0.002)


# TFLOP/s of long tiles of width 128 in bf16 as their authors publish them: full forward, causal forward, full backward.
RATES = [
    ("h100-nvlink", "fa2", (370, 335, 322)),
    ("h100-nvlink", "fa3", (648, 616, 561)),
    ("h200-nvlink", "cudnn", (693, 688, 572)),
    ("a100-nvlink", "fa2", (227, 205, 196)),
    ("b200-nvlink", "fa4", (1535, 1418, 1360)),
    ("4090-pcie", "fa2", (169, 151, 125)),
]


@pytest.mark.parametrize(("machine", "kernel", "published"), RATES)
def test_rates_are_the_published_ones(machine: str, kernel: str, published: tuple[float, ...]) -> None:
    found, rate = MACHINES[machine], MACHINES[machine].rate(kernel)
    mine = (rate.full, rate.full * rate.causal, rate.full * rate.backward)
    assert [found.flops * x / 1e12 for x in mine] == pytest.approx(published, rel=0.1)


def test_every_rate_names_its_source_and_has_a_workspace() -> None:
    for name, machine in MACHINES.items():
        for kernel, rate in machine.kernels.items():
            assert kernel in WORKSPACES and (rate.source or name == "cpu")
    with pytest.raises(UspConfigError, match="a rate is known there of cudnn, fa2, fa3"):
        predict(QWEN3_8B, Degrees(), TrainingStep(4096, kernel="fa4"), H100)


def test_a_slower_kernel_hides_more() -> None:
    """A ring's transfer hides behind a tile: from other lengths on."""
    job, machine = TrainingStep(1 << 17), replace(H100, links=(Link(8, 10e9),))
    fast, slow = (attention(QWEN3_8B, Degrees(1, 8), replace(job, kernel=k), machine) for k in ("fa3", "fa2"))
    assert slow.tiles > 1.5 * fast.tiles and slow.ring_exposed < fast.ring_exposed


def test_mfu_is_counted_as_in_the_training_report() -> None:
    """Model operations of a step: of the plan, and of `UspMetricsCallback`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_usp.callbacks.counting import work_per_token
    from hf_usp.planner.request import shape_of

    sizes: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=512, head_dim=32, **sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shape: ModelShape = shape_of(config)
    tokens = 4096
    pairs = shape.layers * mask_area(tokens, None) * shape.heads * 2 * shape.head_dim
    reported = tokens * work_per_token(model) + 3 * 2 * pairs
    planned = predict(shape, Degrees(), TrainingStep(tokens, checkpointing=True), MACHINES["cpu"])
    assert planned.flops == pytest.approx(reported)
