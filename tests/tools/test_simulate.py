"""A step simulated without memory: equal to one that really ran; the planner's formulas are tested against it."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, LlamaConfig

from hf_usp.errors import UspConfigError
from hf_usp.planner.memory_model import memory
from hf_usp.planner.request import shape_of
from hf_usp.planner.workload import Degrees, TrainingStep
from hf_usp.tools.cli import main
from hf_usp.tools.simulate import report, simulate

from ..planner.published import QWEN3_8B

SMALL = LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=344, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4, head_dim=16)  # fmt: skip # noqa: E501
LLAMA: dict[str, Any] = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128}
LLAMA_8B = {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
LLAMA_70B = {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
QWEN3_32B = {**QWEN3_8B, "hidden_size": 5120, "intermediate_size": 25600, "num_attention_heads": 64}
ALL: dict[str, Any] = {"checkpointing": True, "loss_chunk_size": 8192, "mlp_chunk_size": 32768}
LONG = ALL | {"loss_chunk_size": 65536, "mlp_chunk_size": 131072}  # a few chunks: each takes its time here
K, M = 1 << 10, 1 << 20
# (sizes, tokens of a row, degrees, options); three layers: those between the bottom and the top one are alike.
CASES = [
    (LLAMA_8B, 128 * K, Degrees(1, 1), {"loss_chunk_size": 2048, "kernel": "cudnn", "optimizer": 4}),
    (LLAMA_8B, 1 * M, Degrees(2, 4), {**ALL, "kernel": "fa2", "offload": True}),
    (LLAMA_8B, 5 * M, Degrees(1, 8), {**LONG, "kernel": "fa3", "offload": True, "optimizer": 4}),
    (QWEN3_32B, 1 * M, Degrees(8, 1, dp_shard=2), {**ALL, "kernel": "fa2"}),
    (QWEN3_32B, 256 * K, Degrees(1, 2, dp_shard=4), {"checkpointing": True, "kernel": "cudnn"}),
    (LLAMA_70B, 4 * M, Degrees(4, 8), {**ALL, "kernel": "fa2", "offload": True}),
]
# Layers in chunks, few of them: each takes its time here.
IN_CHUNKS: dict[str, Any] = {"loss_chunk_size": 16384, "optimizer": 4, "kernel": "fa2"}
TILED = [
    (LLAMA_8B, 2 * M, Degrees(1, 4), {**IN_CHUNKS, "head_groups": 4, "offload": True}),
    (LLAMA_8B, 2 * M, Degrees(1, 4), {**IN_CHUNKS, "head_groups": 4, "offload": True, "keep_attention": 2}),
    (LLAMA_8B, 4 * M, Degrees(2, 4), {**IN_CHUNKS, "head_groups": 2, "kernel": "fa3"}),
    (QWEN3_32B, 1 * M, Degrees(8, 1), {**IN_CHUNKS, "head_groups": 8, "optimizer": 12}),
    (LLAMA_70B, 8 * M, Degrees(4, 8), {**IN_CHUNKS, "head_groups": 2, "offload": True}),
]


@pytest.mark.parametrize("case", TILED, ids=str)
def test_the_planner_s_memory_of_layers_in_chunks_is_that_of_the_simulated_step(case: tuple[Any, ...]) -> None:
    """Within 5 % at full width and length, the moments of a layer's backward too, and an evaluation."""
    sizes, tokens, degrees, options = case
    chunk = tokens // degrees.cp // 4
    config = AutoConfig.for_model(**{**sizes, "num_hidden_layers": 2, "max_position_embeddings": 8 * M})
    job = TrainingStep(tokens, layer_chunk_size=chunk, mlp_chunk_size=chunk, **options)
    planned = memory(shape_of(config), degrees, job)
    for backward in (True, False):
        live = simulate(config, degrees, job, backward=backward, inventory=False)
        there = live.there + live.optimizer
        mine = planned.total if backward else sum(planned.moments["evaluation"].values())
        found = {name: phase.peak for name, phase in live.phases.items() if backward or "loss" not in name}
        assert mine == pytest.approx(there + max(found.values()), rel=0.05), (backward, planned.peak, live.phases)
        if backward:
            assert planned.host >= live.host and (live.host > 0) == job.offload
            for name, (place, layer) in product(
                ("attention", "after attention", "before attention"), (("top", 1), ("bottom", 0))
            ):
                mine = sum(planned.moments[f"{place} layer, {name}"].values())
                assert mine == pytest.approx(there + found[f"backward layer {layer} {name}"], rel=0.05), (place, name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_planner_s_memory_is_that_of_the_simulated_step(case: tuple[Any, ...]) -> None:
    """Within 5 % at full width and length, forward and backward, FSDP2 included."""
    sizes, tokens, degrees, options = case
    config = AutoConfig.for_model(**{**sizes, "num_hidden_layers": 3, "max_position_embeddings": 8 * M})
    job = TrainingStep(tokens, **options)
    live, planned = simulate(config, degrees, job, inventory=False), memory(shape_of(config), degrees, job)
    counted = live.there + live.optimizer + live.peak
    assert planned.total == pytest.approx(counted, rel=0.05), (planned.peak, planned.total / counted)
    assert planned.host >= live.host and (live.host > 0) == job.offload
    for name, part in PARTS.items():
        for place, layer in (("top", 2), ("bottom", 0)):
            size = live.there + live.optimizer + live.phases[f"backward layer {layer} {part}"].peak
            assert sum(planned.moments[f"{place} layer, {name}"].values()) == pytest.approx(size, rel=0.07), (
                place,
                name,
            )


PARTS = {"MLP": "mlp", "norm": "post_attention_layernorm", "attention": "self_attn"}


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing")
@pytest.mark.parametrize("element", [4, 2])
@pytest.mark.parametrize("saving", ["", "checkpointing", "layers in chunks"])
def test_a_simulated_step_is_one_that_ran(element: int, saving: str) -> None:
    """The same bytes, to 1 %, as a step on the CPU whose every tensor was there."""
    from counting import Peak
    from transformers import LlamaForCausalLM

    from hf_usp import UspMesh, shard
    from hf_usp.integrations.transformers import apply_memory_options

    layers = {"layer_chunk_size": 64, "head_groups": 2} if saving == "layers in chunks" else {}
    options: dict[str, Any] = {"checkpointing": saving == "checkpointing", **layers}
    options |= {"loss_chunk_size": 64, "mlp_chunk_size": 64} if saving else {}
    job = TrainingStep(512, element=element, optimizer=0, shard_params=False, **options)
    simulated = simulate(SMALL, Degrees(), job)
    dtype = {4: torch.float32, 2: torch.bfloat16}[element]
    model: Any = LlamaForCausalLM._from_config(SMALL, attn_implementation="usp", dtype=dtype).train()
    if saving == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if saving:
        apply_memory_options(model, 64, 64, False, **layers)
    ids = torch.zeros(1, 512, dtype=torch.long)
    batch = shard({"input_ids": ids, "labels": ids}, UspMesh.build(ring_degree=1, ulysses_degree=1))
    if layers:
        model(**batch, use_cache=False)  # layers are tried out
    with Peak(model.parameters()) as counted:
        model(**batch, use_cache=False).loss.backward()
    assert simulated.peak == pytest.approx(counted.peak, rel=0.01)
    assert simulated.there == sum(p.nbytes for p in model.parameters())
    assert not dist.is_initialized()


def test_evaluation_is_planned() -> None:
    for chunk in (4096, None):
        config = AutoConfig.for_model(**{**LLAMA_8B, "num_hidden_layers": 2})
        job = TrainingStep(256 * K, mlp_chunk_size=chunk, loss_chunk_size=2048, kernel="fa2", shard_params=False)
        live = simulate(config, Degrees(1, 4), job, backward=False)
        planned = sum(memory(shape_of(config), Degrees(1, 4), job).moments["evaluation"].values())
        assert planned == pytest.approx(live.there + live.optimizer + live.peak, rel=0.05)


def test_the_report_names_phases_and_what_is_alive() -> None:
    text = report(simulate(SMALL, Degrees(1, 2), TrainingStep(1024, checkpointing=True, kernel="fa2")))
    assert "GB a rank, in `" in text
    for phase in ("forward loss", "recompute layer", "backward layer", "backward final norm", "aten.mul.Tensor"):
        assert phase in text


def test_plan_simulates_the_best_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SMALL.save_pretrained(tmp_path)
    plan = ["plan", "--model", str(tmp_path), "--tokens", "8192", "--gpus", "2", "--tp", "1", "--simulate"]
    assert main(plan) == 0
    text = capsys.readouterr().out
    assert "alive in `" in text and "accelerate launch" in text
    assert main([*plan, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert max(found["simulated"].values()) == pytest.approx(found["splits"][0]["memory_total"], rel=0.05)


def test_what_cannot_be_simulated_is_refused() -> None:
    with pytest.raises(UspConfigError, match="a simulation with tensor parallelism 2"):
        simulate(SMALL, Degrees(tp=2), TrainingStep(64))
