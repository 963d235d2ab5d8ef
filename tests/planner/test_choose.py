"""`UspParallelismConfig(ulysses_degree=None)`: the planner's choice, the same on every rank, refused on every rank."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

import hf_usp
from hf_usp.planner import choose_degree, ranked, request
from hf_usp.planner.hardware import MACHINES, recognised
from hf_usp.planner.request import shape_of
from hf_usp.sharding.degrees import choose_ulysses_degree

from ..harness import fresh_accelerate
from ..ranks import Ranks
from ..tiny import tiny_model
from .published import QWEN3_8B, SAME, TABLES

LLAMA3_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
QWEN2_05B = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
# (sizes, machine, tp, cp, ranks, node, tokens of a row)
SPLITS = [
    (QWEN3_8B, "h100-nvlink", 1, 8, 8, 8, 65536),
    (QWEN3_8B, "h100-nvlink", 1, 16, 16, 8, 32768),
    (QWEN3_8B, "4090-pcie", 1, 8, 8, 8, 16384),
    (LLAMA3_8B, "a800-nvlink", 2, 8, 16, 8, 131072),
    (LLAMA3_8B, "l20-pcie", 1, 8, 8, 8, 131072),
    (LLAMA3_8B, "h100-nvlink", 1, 16, 32, 4, 32768),
    (QWEN2_05B, "a100-nvlink", 1, 8, 32, 8, 16384),
    (QWEN2_05B, "cpu", 1, 4, 4, 4, 4096),
]


def folder(path: Path, sizes: dict[str, Any]) -> str:
    (path / "config.json").write_text(json.dumps(sizes))
    return str(path)


def test_the_choice_is_what_plan_ranks_first(tmp_path: Path) -> None:
    chosen = []
    for sizes, machine, tp, cp, ranks, node, tokens in SPLITS:
        what = request(folder(tmp_path, sizes), tokens=tokens, gpus=ranks, machine=machine, gpus_per_node=node)
        alike = [c.degrees.ulysses for c in ranked(what) if (c.degrees.tp, c.degrees.cp) == (tp, cp)]
        degree, reason = choose_degree(
            AutoConfig.for_model(**sizes),
            MACHINES[machine],
            cp_size=cp,
            tp_size=tp,
            ranks=ranks,
            node=node,
            tokens=tokens,
        )
        assert degree == alike[0], (machine, tp, cp, alike)
        assert f"ulysses {degree} x ring {cp // degree} is the fastest" in reason and f"{node} ranks a node" in reason
        chosen.append(degree)
    assert len(set(chosen)) >= 4, "these cases tell degrees apart"


def test_ulysses_stays_inside_a_node_and_follows_length_and_links() -> None:
    config = AutoConfig.for_model(**{**LLAMA3_8B, "num_key_value_heads": 32})
    sizes: dict[str, Any] = {"cp_size": 16, "tp_size": 1, "ranks": 16, "tokens": 32768}
    l20 = MACHINES["l20-pcie"]
    assert [choose_degree(config, l20, node=node, **sizes)[0] for node in (16, 8, 4, 2, 1)] == [16, 8, 4, 2, 1]
    assert choose_degree(config, l20, node=8, **{**sizes, "tp_size": 2, "cp_size": 8})[0] == 4, "tp lies inside"
    long = choose_degree(config, l20, node=8, **{**sizes, "tokens": 1 << 20})[0]
    assert long < 8, "long rows hide the ring"
    assert choose_degree(config, l20, node=8, **{**sizes, "tokens": None}) == choose_degree(
        config, l20, node=8, **{**sizes, "tokens": 16 * 8192}
    )


def test_an_unknown_machine_gets_the_fewest_bytes() -> None:
    config = AutoConfig.for_model(**LLAMA3_8B)
    degree, reason = choose_degree(config, None, cp_size=16, tp_size=1, ranks=16, node=8, tokens=None)
    assert (degree, reason) == choose_ulysses_degree(16, 32, 8, 8) and degree == 8


@pytest.mark.parametrize(
    ("device", "preset"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-nvlink"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A800-SXM4-80GB", "a800-nvlink"),
        ("NVIDIA L20", "l20-pcie"),
        ("NVIDIA GeForce RTX 4090", "4090-pcie"),
        ("NVIDIA B200", "b200-nvlink"),
        ("NVIDIA GeForce RTX 3060", None),
        ("some cpu", None),
    ],
)
def test_machines_by_the_names_of_their_gpus(device: str, preset: str | None) -> None:
    assert recognised(device) == preset


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text", "mixtral", "qwen3_next", "gpt_oss", "gpt2", "phi3"])
def test_configs_of_other_makes_have_sizes(kind: str) -> None:
    config = AutoConfig.for_model(kind)
    shape = shape_of(config)
    assert all(isinstance(x, int) for name, x in vars(shape).items() if name not in ("window", "tied", "indexer"))
    assert 1e7 < shape.params < 2e12
    degree, reason = choose_degree(config, MACHINES["h100-nvlink"], cp_size=8, tp_size=1, ranks=8, node=8, tokens=None)
    assert degree in (1, 2, 4, 8) and "fastest" in reason


def choices(files: list[str]) -> dict[str, Any]:
    """Of one rank: with another LOCAL_WORLD_SIZE on rank 3, and with a file of a machine that one rank has not."""
    from accelerate import Accelerator

    rank, found = int(os.environ["RANK"]), {}
    for name, machine in [("cpu", None), ("pcie", "l20-pcie"), ("file", files[rank])]:
        fresh_accelerate()
        os.environ["LOCAL_WORLD_SIZE"] = "2" if rank == 3 else "4"
        model = tiny_model("llama", num_attention_heads=8, num_key_value_heads=8)
        config = hf_usp.UspParallelismConfig(
            cp_size=4, dp_replicate_size=1, machine=machine, sequence_length=2048, self_check=False
        )
        try:
            Accelerator(parallelism_config=config).prepare(model)
            found[name] = config.ulysses_degree
        except hf_usp.UspConfigError as refusal:
            found[name] = str(refusal)
    os.environ["LOCAL_WORLD_SIZE"] = "4"
    return found


def test_ranks_that_know_different_things_choose_alike(four_ranks: Ranks, tmp_path: Path) -> None:
    there = tmp_path / "check.json"
    machine = {"name": "cpu", "matmul_flops": 8e10, "memory_bandwidth": 8e9, "memory": 8e9}
    there.write_text(json.dumps({"machine": {**machine, "links": [{"ranks": 4, "bandwidth": 1e9, "latency": 1e-4}]}}))
    results = four_ranks.run(choices, [str(there)] * 3 + [str(tmp_path / "lost.json")])
    assert all(it == results[0] for it in results), results
    config = tiny_model("llama", num_attention_heads=8, num_key_value_heads=8).config
    for name, preset in (("cpu", "cpu"), ("pcie", "l20-pcie")):
        expected = choose_degree(config, MACHINES[preset], cp_size=4, tp_size=1, ranks=4, node=2, tokens=2048)[0]
        assert results[0][name] == expected
    assert "rank 3: machine" in results[0]["file"] and "lost.json': No such file" in results[0]["file"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"machine": "v100"}, "machine 'v100'. Rule: a machine is one of a100-nvlink"),
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"sequence_length": 1.5}, "sequence_length=1.5"),
        ({"ranks_per_node": -1}, "ranks_per_node=-1"),
    ],
)
def test_what_nothing_can_be_chosen_from(options: dict[str, Any], said: str) -> None:
    with pytest.raises(hf_usp.UspConfigError) as refusal:
        hf_usp.UspParallelismConfig(cp_size=4, **options)
    assert said in str(refusal.value)


# Measured with a ring that relays, most of them attention alone, while `ranked` ranks training steps with our ring. On
# the A800s a ring of two exposes its last gradients on the network, one of eight inside the node.
DISAGREES = {
    ("a800-nvlink", 81920): {(8, 2)},
    ("l20-pcie", 131072): {(2, 1)},
    ("l20-pcie", 32768): {(1, 4)},
    ("a100-nvlink", 32768): {(8, 4), (8, 2)},
}


@pytest.mark.parametrize(("name", "ranks", "tokens", "timed", "table"), TABLES)
def test_ranked_agrees_with_the_published_orders(
    name: str, ranks: int, tokens: int, timed: str, table: dict[int, float], tmp_path: Path
) -> None:
    """Whole steps (A800) with the published best degree for this library's ring, too; else as docs/roofline.md says."""
    what = request(folder(tmp_path, LLAMA3_8B), tokens=tokens, gpus=ranks, machine=name)
    order = [c.degrees.ulysses for c in ranked(what) if c.degrees.cp == ranks and c.degrees.ulysses in table]
    if timed == "step":
        assert order[0] == max(table, key=table.__getitem__)
    pairs = {(a, b) for a in table for b in table if table[a] > table[b] * (1 + SAME)}
    wrong = {(a, b) for a, b in pairs if order.index(a) > order.index(b)}
    assert wrong == DISAGREES.get((name, tokens), set())
