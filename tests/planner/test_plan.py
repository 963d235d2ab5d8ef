"""`hf-usp plan`: legal splits, their order, memory against measured runs, the files it writes, and bad input."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoConfig

from hf_usp.errors import UspConfigError
from hf_usp.planner import find_machine, longest, longest_of_all, ranked, request
from hf_usp.planner.hardware import MACHINES
from hf_usp.planner.memory_model import memory
from hf_usp.planner.request import shape_of
from hf_usp.planner.roofline import predict
from hf_usp.planner.search import best_way
from hf_usp.planner.workload import Degrees, ModelShape, TrainingStep
from hf_usp.tools.cli import main

from .published import QWEN3_8B

SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 18, "sliding_window": 4096}


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    return str(tmp_path)


def plan(model: str, *arguments: str) -> int:
    return main(["plan", "--model", model, *arguments])


def test_every_split_is_legal_and_the_fastest_that_fits_comes_first(model: str) -> None:
    what = request(model, tokens=65536, gpus=16, machine="a800-nvlink")
    found = ranked(what)
    seen = {(c.degrees.tp, c.degrees.ulysses, c.degrees.ring, c.degrees.dp_shard) for c in found}
    assert len(seen) == len(found)
    for tp, ulysses, ring, data in seen:
        assert tp * ulysses * ring * data == 16
        assert 8 % tp == 0 and (32 // tp) % ulysses == 0 or ulysses == 1, "whole heads everywhere"
    for expected in [(1, 8, 2, 1), (1, 4, 4, 1), (2, 4, 2, 1), (8, 1, 2, 1), (1, 1, 1, 16)]:
        assert expected in seen
    fits = [c.fits for c in found]
    assert fits == sorted(fits, reverse=True) and fits[0]
    speeds = [c.prediction.tokens_per_second for c in found if c.fits]
    assert speeds == sorted(speeds, reverse=True)
    assert all(c.prediction.memory.total <= what.budget for c in found if c.fits)


def test_ulysses_stays_inside_a_node_and_data_parallelism_beats_a_split_that_is_not_needed(model: str) -> None:
    best = ranked(request(model, tokens=262144, gpus=16, machine="h100-nvlink", gpus_per_node=8))[0]
    assert best.degrees.ulysses <= 8
    short = ranked(request(model, tokens=4096, gpus=8, machine="h100-nvlink"))[0]
    assert short.degrees.cp == 1 and short.degrees.dp_shard * short.degrees.tp == 8


def test_short_rows_are_bound_by_the_host(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It grows with layers, checkpointing and the ring, not with tokens; the plan says where it decides."""
    short, longer = (
        ranked(request(model, tokens=tokens, gpus=8, machine="h100-nvlink"))[0].prediction for tokens in (256, 262144)
    )
    assert short.host > short.seconds and longer.host < 0.1 * longer.seconds
    for tokens, said in (("256", True), ("262144", False)):
        assert plan(model, "--tokens", tokens, "--gpus", "8", "--machine", "h100-nvlink") == 0
        assert ("bound by the host" in capsys.readouterr().out) is said
    shape, job = shape_of(AutoConfig.for_model(**QWEN3_8B)), TrainingStep(65536)
    hosts = [
        predict(shape, degrees, step, MACHINES["h100-nvlink"]).host
        for degrees, step in (
            (Degrees(8, 1), job),
            (Degrees(4, 2), job),
            (Degrees(1, 8), job),
            (Degrees(1, 8), replace(job, checkpointing=True)),
            (Degrees(1, 8), replace(job, tokens=131072, checkpointing=True)),
        )
    ]
    assert hosts[0] < hosts[1] < hosts[2] < hosts[3] == hosts[4]
    assert predict(shape, Degrees(1, 8), job, MACHINES["cpu"]).host == 0


def test_packed_documents_cost_less_attention(model: str) -> None:
    sizes: dict[str, Any] = {"tokens": 65536, "gpus": 8, "machine": "h100-nvlink"}
    whole, found = ranked(request(model, **sizes))[0], ranked(request(model, **sizes, documents=(4096,) * 4))
    (packed,) = [candidate for candidate in found if candidate.degrees == whole.degrees]
    assert packed.prediction.attention < 0.1 * whole.prediction.attention
    one = ranked(request(model, **sizes, documents=(65536,)))[0]
    assert one.prediction == whole.prediction, "a document as long as the row is no packing"


def test_the_longest_row_is_an_edge(model: str) -> None:
    what = request(model, tokens=131072, gpus=8, machine="h100-nvlink")
    degrees = ranked(what)[0].degrees
    edge = longest(what, degrees)
    at, beyond = (
        memory(what.model, degrees, TrainingStep(n, checkpointing=True, loss_chunk_size=2048)).total
        for n in (edge, edge + 1024)
    )
    assert at <= what.budget < beyond


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (36, 0, 1)),
        (SLIDING, (36, 0, 1)),  # Qwen's windows are off unless they are asked for
        ({**SLIDING, "use_sliding_window": True}, (36, 18, 1)),
    ],
)
def test_shapes_of_configs(changes: dict[str, Any], expected: tuple[int, int, int]) -> None:
    shape = shape_of(AutoConfig.for_model(**{**QWEN3_8B, **changes}))
    assert (shape.layers, shape.sliding_layers, shape.experts) == expected
    assert shape.params == pytest.approx(8.19e9, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "glm_moe_dsa", "indexer_types": ["full", "shared"] * 39}, (78, 39, 2048, 32, 576)),
        (
            {"model_type": "minimax_m3_vl_text", "layer_types": ["full_attention", "minimax_m3_sparse"] * 30},
            (30, 30, 2048, 4, 2 * 4 * 128),
        ),
        (QWEN3_8B, None),
    ],
)
def test_layers_that_select_their_keys(changes: dict[str, Any], expected: tuple[int, ...] | None) -> None:
    it = shape_of(AutoConfig.for_model(**changes)).indexer
    assert (it and (it.layers, it.scoring, it.selected, it.heads, it.gathered)) == expected


def test_a_plan_for_short_documents_selects_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AutoConfig.for_model("glm_moe_dsa", n_routed_experts=8).save_pretrained(tmp_path)
    sizes = "--tokens 131072 --gpus 64 --machine h100-nvlink --tp 1".split()
    assert plan(str(tmp_path), *sizes) == 0
    assert "select 2,048 keys" in capsys.readouterr().out
    assert plan(str(tmp_path), *sizes, "--documents", "2048,512") == 0
    assert "select" not in capsys.readouterr().out


def test_a_mixture_of_experts_has_more_parameters_than_a_token_meets() -> None:
    shape = shape_of(AutoConfig.for_model("qwen3_moe", hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, vocab_size=151936))  # fmt: skip # noqa: E501
    assert shape.params == pytest.approx(30.5e9, rel=0.02), "Qwen3-30B-A3B"
    active = shape.active_layer_params * shape.layers + 2 * shape.hidden * shape.vocab
    assert active == pytest.approx(3.3e9, rel=0.05)


def test_table_config_picture_and_json(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yaml, png = tmp_path / "plan.yaml", tmp_path / "plan.png"
    sizes = "--tokens 131072 --gpus 16 --machine h100-nvlink".split()
    assert plan(model, *sizes, "--config", str(yaml), "--picture", str(png)) == 0
    text = capsys.readouterr().out
    for expected in ("8.19 B parameters", "16 x h100-nvlink, 8 a node", "the longest row of this split", "optimizer "):
        assert expected in text
    loaded = load_config_from_file(str(yaml))
    assert (loaded.num_processes, loaded.num_machines, loaded.fsdp_config["fsdp_version"]) == (16, 2, 2)
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert plan(model, *sizes, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    best = found["splits"][0]
    assert f"--ulysses-degree-in-cp {best['ulysses']}" in yaml.read_text()
    assert best["fits"] and math.prod(best[k] for k in ("tp", "ulysses", "ring", "dp_shard")) == 16
    assert set(best["memory"]) == {"weights", "gradients", "optimizer", "activations", "logits", "buffers"}


def test_mlps_in_chunks_are_planned_where_they_are_asked_for(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes: dict[str, Any] = {"tokens": 65536, "gpus": 8, "machine": "h100-nvlink"}
    without, with_them = (ranked(request(model, **sizes, mlp_chunk_size=n)) for n in (None, 1024))
    assert all(c.job.mlp_chunk_size is None for c in without)
    assert any(c.job.mlp_chunk_size == 1024 for c in with_them), "where they fit a faster way, or fit at all"
    degrees = next(c.degrees for c in with_them if c.degrees.cp == 8)
    assert longest(request(model, **sizes, mlp_chunk_size=1024), degrees) > longest(request(model, **sizes), degrees)
    tight = "--tokens 524288 --gpus 8 --tp 1 --offload --mlp-chunk-size 1024 --memory 36".split()
    yaml, png = tmp_path / "plan.yaml", tmp_path / "plan.png"
    assert plan(model, *tight, "--config", str(yaml), "--picture", str(png)) == 0
    assert "MLPs in chunks of 1024" in capsys.readouterr().out
    assert "--offload-checkpoints" in yaml.read_text() and "--mlp-chunk-size 1024" in yaml.read_text()
    assert plan(model, *tight, "--json") == 0
    assert json.loads(capsys.readouterr().out)["splits"][0]["mlp_chunk_size"] == 1024
    with pytest.raises(UspConfigError, match="mlp_chunk_size = 64 with 8 experts"):
        predict(
            ModelShape(2, 64, 64, 4, 4, 16, 64, experts=8),
            Degrees(),
            TrainingStep(128, mlp_chunk_size=64),
            MACHINES["cpu"],
        )


def test_layers_in_chunks_are_planned_where_they_are_asked_for(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes: dict[str, Any] = {"tokens": 65536, "gpus": 8, "machine": "h100-nvlink", "most_tp": 1, "mlp_chunk_size": 4096}
    sizes |= {"allow_offload": True, "host_memory_gb": 50_000}
    without, with_them = (request(model, **sizes, layer_chunk_size=n) for n in (None, 4096))
    assert all(c.job.layer_chunk_size is None for c in ranked(without))
    assert longest_of_all(with_them)[0] > 1.5 * longest_of_all(without)[0]
    reach, degrees = longest_of_all(with_them)
    assert degrees.cp > 1 and best_way(replace(with_them, tokens=reach), degrees).job.head_groups > 1
    host = replace(with_them, tokens=1 << 20, keep_attention=True)
    kept = [best_way(replace(host, host_budget=size), Degrees(1, 8)) for size in (30e9, 60e9, 1e12)]
    assert 0 < kept[1].job.keep_attention < kept[2].job.keep_attention == 36, [c.savings for c in kept]
    assert all(c.fits for c in kept) and kept[2].prediction.seconds < kept[1].prediction.seconds
    tight = "--tokens 1048576 --gpus 8 --tp 1 --offload --layer-chunk-size 4096 --memory 36".split()
    yaml = tmp_path / "plan.yaml"
    assert plan(model, *tight, "--config", str(yaml), "--picture", str(tmp_path / "plan.png")) == 0
    assert "layers in chunks of 4096" in capsys.readouterr().out and "--layer-chunk-size 4096" in yaml.read_text()
    assert plan(model, *tight, "--json") == 0
    assert json.loads(capsys.readouterr().out)["splits"][0]["layer_chunk_size"] == 4096


def test_the_optimizer_and_host_memory_decide_what_fits(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes: dict[str, Any] = {"tokens": 65536, "gpus": 2, "machine": "h100-nvlink", "allow_offload": True, "most_tp": 1}
    sizes |= {"mlp_chunk_size": 4096}
    found = {way: request(model, **sizes, optimizer=way) for way in ("fp32", "bf16", "cpu")}
    reach = {way: longest_of_all(what)[0] for way, what in found.items()}
    assert reach["fp32"] < reach["bf16"] < reach["cpu"]
    tight = request(model, **{**sizes, "gpus": 8}, host_memory_gb=200)
    assert longest_of_all(tight)[0] < longest_of_all(request(model, **{**sizes, "gpus": 8}))[0]
    on_host = ranked(found["cpu"])[0]
    assert on_host.prediction.memory.host > 60e9 and on_host.prediction.memory.optimizer == 0
    assert on_host.prediction.offload > 1, "AdamW on the host takes its time"
    yaml = tmp_path / "plan.yaml"
    options = "--tokens 65536 --gpus 2 --offload --tp 1 --optimizer cpu --config".split()
    assert plan(model, *options, str(yaml)) == 0
    text = capsys.readouterr().out
    assert (
        "host memory of the best: " in text and "; of any: " in text and "attention by cudnn: 65% of the peak" in text
    )
    assert "fsdp_offload_params: true" in yaml.read_text()
    assert plan(model, *options[:-2], "bf16", "--config", str(yaml)) == 0
    assert "--dtype bfloat16" in yaml.read_text() and "mixed_precision: 'no'" in yaml.read_text()
    capsys.readouterr()
    assert plan(model, *options[:-2], "cpu", "--host-memory", "100") == 2
    assert "GB of host memory a rank of 42.5 GB" in capsys.readouterr().err


def test_a_measured_machine(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "check.json"
    links = [{"ranks": 4, "bandwidth": 1e11, "latency": 1e-5}, {"ranks": 8, "bandwidth": 1e10, "latency": 2e-5}]
    machine = {"name": "cuda X", "matmul_flops": 6e14, "memory_bandwidth": 3e12, "memory": 8e10, "links": links}
    path.write_text(json.dumps({"machine": machine}))
    found = find_machine(str(path))
    assert (found.ranks_per_node, found.flops * found.matmul) == (4, pytest.approx(6e14))
    assert plan(model, "--tokens", "65536", "--gpus", "64", "--machine", str(path)) == 0
    assert "64 x cuda X, 4 a node" in capsys.readouterr().out


def test_an_impossible_budget_says_what_is_missing_and_what_fits(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(model, "--tokens", "2000000", "--gpus", "8") == 2
    error = capsys.readouterr().err
    assert "GB too much (weights" in error and "16 GPUs" not in error.split("Remedy")[0]
    assert re.search(r"rows of [\d,]{7,} tokens fit; ", error) and "GPUs hold 2,000,000 tokens" in error
    assert plan(model, "--tokens", "1024", "--gpus", "1", "--memory", "1") == 2
    assert "the smallest split needs" in capsys.readouterr().err


BASE = {"--tokens": "65536", "--gpus": "8"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"--tokens": "-5"}, "tokens=-5"),
        ({"--tokens": "0"}, "tokens=0"),
        ({"--tokens": "99999999999"}, "tokens=99999999999"),
        ({"--gpus": "0"}, "gpus=0"),
        ({"--gpus": "12"}, "choose 8 GPUs"),
        ({"--gpus-per-node": "-1"}, "gpus_per_node=-1"),
        ({"--memory": "-80"}, "memory = -80.0 GB"),
        ({"--memory": "nan"}, "memory = nan GB"),
        ({"--memory": "1e99"}, "at most 100,000"),
        ({"--host-memory": "0"}, "host-memory = 0.0 GB"),
        ({"--optimizer": "adam"}, "the state of AdamW is one of fp32, bf16, cpu"),
        ({"--kernel": "fa4"}, "a rate is known there of cudnn, fa2, fa3"),
        ({"--rows": "0"}, "rows=0"),
        ({"--mlp-chunk-size": "0"}, "mlp_chunk_size=0"),
        ({"--layer-chunk-size": "0"}, "layer_chunk_size=0"),
        ({"--documents": "100,0"}, "a document of 0 tokens"),
        ({"--machine": "v100"}, "a machine is one of " + ", ".join(MACHINES)),
        ({"--machine": "none.json"}, "none.json': No such file"),
        ({"--machine": "{model}/config.json"}, "holds no measured machine"),
        ({"--model": "no/such-model"}, "no config of 'no/such-model' on this machine"),
        ({"--model": "{model}/broken"}, "Remedy: mend its config.json"),
        ({"--config": "/dev/full"}, "a result could not be written"),
        ({"--config": "no/such/folder/plan.yaml"}, "a result file 'no/such/folder/plan.yaml'"),
        ({"--picture": "plan.jpeg"}, ".png, .svg, .pdf"),
    ],
)
def test_bad_input(model: str, changes: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    (Path(model) / "broken").mkdir()
    (Path(model) / "broken" / "config.json").write_text("{")
    given = {"--model": model, **BASE, **changes}
    words = [word.format(model=model) for pair in given.items() for word in pair]
    assert main(["plan", *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1
    assert captured.out == "" or "/dev/full" in words, "refused before anything is printed"
