"""`memory="auto"`: another way for another length, with the numbers of one process; and what is refused."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_usp
from hf_usp.batch.sharded_tensors import context_of
from hf_usp.integrations import memory_choice
from hf_usp.integrations.memory_choice import choose_memory
from hf_usp.memory.chosen import chosen_memory
from hf_usp.memory.offloader import ActivationOffloader
from hf_usp.memory.tiled_layer import tile_layers, tiled_layer
from hf_usp.planner import PlanRequest
from hf_usp.planner.hardware import MACHINES
from hf_usp.planner.way import in_words, told, way_of
from hf_usp.planner.workload import Degrees, ModelShape, TrainingStep
from hf_usp.utils.patches import AttributePatches

from ..harness import fresh_accelerate, relative, step
from ..ranks import Ranks
from ..tiny import batch_of, tiny_model

# Bytes of a rank by the planner, in thousands: 128 tokens on 4 ranks whole 479, 256 whole 679, 512 in chunks of 8 and
# two groups of heads 509 (in one group 530).
MEMORY = {
    128: "whole layers",
    256: "layers in chunks of 8, attention of 2 layers kept on the device",
    512: "layers in chunks of 8, 2 groups of heads",
}
LIMIT = 520_000
CHUNK = 8
LARGE = PlanRequest(
    "Llama 3 8B",
    ModelShape(32, 4096, 14336, 32, 8, 128, 128256),
    MACHINES["h100-nvlink"],
    tokens=1,
    gpus=8,
    budget=73.6e9,
    allow_offload=True,
    layer_chunk_size=4096,
    auto=True,
    like=TrainingStep(1, kernel="cudnn"),
    host_budget=212e9,
)


def machine_file(folder: Path, memory: float) -> str:
    """A file as `hf-usp check` writes it of a CPU, with other memory."""
    links = [{"ranks": 4, "bandwidth": 1e9, "latency": 1e-4}, {"ranks": 8, "bandwidth": 1e9, "latency": 1e-4}]
    machine = {"name": "cpu", "matmul_flops": 5e10, "memory_bandwidth": 8e9, "memory": memory / 0.92, "links": links}
    (folder / "check.json").write_text(json.dumps({"machine": machine}))
    return str(folder / "check.json")


def rows_of(length: int) -> dict[str, Any]:
    return batch_of("packed", 1, length)


def trained(machine: str, lengths: list[int], told: bool = False) -> dict[str, Any]:
    """On one rank: loss, gradients and way of each batch, two of them before any backward, then refusals."""
    from accelerate import Accelerator

    patches, lines = AttributePatches(), list[str]()
    patches.set(memory_choice, "AUTO_CHUNK", CHUNK)
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("hf_usp.memory.chosen")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    fresh_accelerate()
    try:
        config = hf_usp.UspParallelismConfig(cp_size=4, ulysses_degree=2, memory="auto", machine=machine)
        accelerator = Accelerator(cpu=True, parallelism_config=config)
        model = accelerator.prepare(tiny_model().train())
        found: dict[str, Any] = {"steps": {}, "config": repr(config)}
        for length in lengths:
            found["steps"][length] = step(model, **rows_of(length))[:2]
        inner = model.module
        with torch.no_grad():
            found["evaluation"] = model(**rows_of(512), use_cache=False).loss.item()
        try:
            model(**rows_of(2048))
        except hf_usp.UspConfigError as refusal:
            found["refused"] = str(refusal)
        chosen = chosen_memory(inner)
        assert chosen is not None
        found["ways"] = {key: in_words(way.job) for key, way in chosen.ways.items()}
        found["verdicts"] = [set(tiled_layer(layer).verdicts.values()) for layer in inner.model.layers]  # type: ignore[union-attr]
        found["described"] = hf_usp.describe(inner)
        hf_usp.remove_context_parallel(inner)
        found["left"] = [layer.gradient_checkpointing for layer in inner.model.layers], chosen_memory(inner)
        return found | {"lines": lines}
    finally:
        log.removeHandler(handler)
        patches.undo()


def test_another_length_gets_another_way(four_ranks: Ranks, tmp_path: Path) -> None:
    """Losses and gradients of one process in each; the log says it once a length; too long is refused on every rank."""
    lengths = [128, 512, 256, 512, 128]
    results = four_ranks.run(trained, machine_file(tmp_path, LIMIT), lengths)
    model = tiny_model(attention="eager").train()
    reference = {length: step(model, **rows_of(length))[:2] for length in MEMORY}
    for rank, found in enumerate(results):
        for length, (loss, gradients) in found["steps"].items():
            assert loss == pytest.approx(reference[length][0], abs=1e-5)
            for name, gradient in gradients.items():
                assert relative(gradient, reference[length][1][name.removeprefix("module.")]) < 1e-5, (length, name)
        assert found["evaluation"] == pytest.approx(reference[512][0], abs=1e-5)
        ways = {length: way for (_, length, training), way in found["ways"].items() if training}
        assert ways == MEMORY
        assert found["verdicts"] == [{None}] * 2, "layers have been computed in chunks"
        assert found["left"] == ([False] * 2, None) and "memory=" in found["described"]
        for said in ("device: ", "rows of ", " tokens fit in a step", "Remedy: "):
            assert said in found["refused"]
        lines = [line for line in found["lines"] if "tokens a rank" in line]
        assert len(lines) == (4 if rank == 0 else 0), lines
    told = results[0]["lines"][1]
    assert told.startswith(
        "usp: memory: 128 tokens a rank: layers in chunks of 8, 2 groups of heads, 0.00051 of 0.00052 GB"
    )
    assert "memory='auto'" in results[0]["config"]


def test_one_rank_has_whole_layers_checkpointed_or_not(tmp_path: Path) -> None:
    """A backward finds the way of its own forward, though another batch came between."""
    from accelerate import Accelerator

    fresh_accelerate()
    config = hf_usp.UspParallelismConfig(memory="auto", machine=machine_file(tmp_path, 600_000))
    model = Accelerator(cpu=True, parallelism_config=config).prepare(tiny_model(attention="eager").train())
    reference = tiny_model(attention="eager").train()
    batches = [rows_of(32), rows_of(96)]
    losses, calls = [model(**batch, use_cache=False).loss for batch in batches], list[int]()
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for again, loss, batch in zip((0, 1), losses, batches, strict=True):
        model.zero_grad()
        (loss * 3).backward()
        assert len(calls) == again, "a checkpointed layer is computed again"
        expected, gradients, _ = step(reference, **batch)
        assert loss.item() == pytest.approx(expected, abs=1e-5)
        for name, p in model.named_parameters():
            assert relative(p.grad, gradients[name]) < 1e-5
    chosen = chosen_memory(model)
    assert chosen is not None
    assert [in_words(way.job) for way in chosen.ways.values()] == ["whole layers", "whole layers, checkpointed"]


def test_a_dict_means_the_options() -> None:
    options = {"layer_chunk_size": 4096, "head_groups": 4, "loss_chunk_size": 2048, "offload_checkpoints": True}
    config, same = (hf_usp.UspParallelismConfig(4, 2, **way) for way in ({"memory": options}, options))
    assert config.to_json() == same.to_json() and config.head_groups == 4
    again = hf_usp.UspParallelismConfig(**config.to_json())
    assert again.to_json() == config.to_json()
    auto = hf_usp.UspParallelismConfig(4, 2, memory="auto")
    assert hf_usp.UspParallelismConfig(**auto.to_json()).memory == "auto"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"memory": "most"}, "memory='most'"),
        ({"memory": 4096}, "memory=4096"),
        ({"memory": {"chunk": 4096}}, "memory with the key 'chunk'"),
        ({"memory": {"layer_chunk_size": 8}, "mlp_chunk_size": 8}, "and mlp_chunk_size=8"),
        ({"memory": "auto", "offload_checkpoints": True}, "and offload_checkpoints=True"),
        ({"memory": {"layer_chunk_size": 0}}, "layer_chunk_size=0"),
        ({"memory": {"head_groups": 2}}, "head_groups=2 without layer_chunk_size"),
        ({"memory": "auto", "gather_outputs": True}, "memory='auto' with gather_outputs=True"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(hf_usp.UspConfigError, match=named):
        hf_usp.UspParallelismConfig(**{"cp_size": 2, **options})


def test_more_groups_than_heads_in_a_dict_are_refused(two_ranks: Ranks) -> None:
    assert all("head_groups=8 for 4 query heads" in said for said in two_ranks.run(too_many_groups))


def too_many_groups() -> str:
    mesh = hf_usp.UspMesh.build(ring_degree=2, ulysses_degree=1)
    with pytest.raises(hf_usp.UspModelError) as refusal:
        hf_usp.apply_context_parallel(tiny_model(), mesh, memory={"layer_chunk_size": 8, "head_groups": 8})
    return str(refusal.value)


def test_memory_that_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that does not say, a device that does not say, a model whose sizes the planner does not know."""
    model = tiny_model()
    with pytest.raises(hf_usp.UspConfigError, match="memory='auto' on a mtia"):
        monkeypatch.setattr(torch, "get_device_module", lambda device: object())
        choose_memory(model, None, torch.device("mtia"))
    (tmp_path / "meminfo").write_text("MemTotal: 1 kB\n")
    with pytest.raises(hf_usp.UspConfigError, match="memory='auto' on a host"):
        memory_choice._available(str(tmp_path / "meminfo"))
    model.config.num_attention_heads = 0
    with pytest.raises(hf_usp.UspConfigError, match="without layers, hidden size, heads or vocabulary"):
        choose_memory(model, None, torch.device("cpu"))


def test_a_way_says_what_is_offloaded_and_kept_and_how_many_groups_there_are() -> None:
    """Read by layers in chunks from the context of their forward."""
    model = tiny_model().train()
    batch = hf_usp.shard(rows_of(32), hf_usp.UspMesh.build(ring_degree=1, ulysses_degree=1))
    loss, gradients, _ = step(model, **batch)
    context, calls = context_of(*batch.values()), list[int]()
    assert context is not None

    class Recording(ActivationOffloader):
        def start(self, tensor: torch.Tensor) -> None:
            calls.append(tensor.numel())
            super().start(tensor)

    for layer in tile_layers(model, CHUNK, 1):
        tiled = tiled_layer(layer)
        assert tiled is not None
        tiled.offloader = Recording()
    for way, groups, often, attends in (
        ({"layer_chunk_size": CHUNK, "head_groups": 2, "offload": True}, 2, 2, 2 * 2 * 2),
        (
            {"layer_chunk_size": CHUNK, "head_groups": 2, "keep_attention": 1, "offload": True},
            2,
            2 + 2 * 2,
            2 * (2 + 1),
        ),
        ({"layer_chunk_size": CHUNK, "head_groups": 4, "keep_attention": 2}, 4, 0, 4 * 2),
        ({"checkpointing": True}, 1, 0, 2),
    ):
        calls.clear()
        context.attention_calls.clear()
        context.way = TrainingStep(32, **way)  # type: ignore[arg-type]
        again, mine, _ = step(model, **batch)
        assert again == pytest.approx(loss, rel=1e-6) and len(calls) == often
        assert all(relative(mine[name], gradients[name]) < 1e-5 for name in gradients)
        assert sum(context.attention_calls.values()) == attends, "the last layers keep attention"
        widths = {shape.heads for shape in context.attention_calls}
        assert widths == {4 // groups}, context.attention_calls


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (1 << 16, "whole layers"),
        (1 << 18, "whole layers, checkpointed"),
        (1 << 21, "layers in chunks of 4,096, inputs in host memory"),
        (1 << 22, "layers in chunks of 4,096, 2 groups of heads, inputs in host memory"),
    ],
)
def test_ways_of_a_large_model(tokens: int, said: str) -> None:
    """Llama 3 8B on 8 GPUs of 80 GB, weights and AdamW's state in fp32 over all of them."""
    found = way_of(replace(LARGE, tokens=tokens), Degrees(1, 8))
    assert in_words(found.job) == said
    assert f": {said}, " in told(replace(LARGE, tokens=tokens), Degrees(1, 8), found)


def test_a_host_that_is_too_small_is_named() -> None:
    with pytest.raises(hf_usp.UspConfigError, match=r"host: [\d,.]+ of 212 GB.*rows of [\d,]+ tokens fit in a step"):
        way_of(replace(LARGE, tokens=8 << 20), Degrees(1, 8))
