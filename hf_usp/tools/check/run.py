"""The check itself: stage after stage on every rank, the verdict on one."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from ...distributed.mesh import UspMesh
from ...errors import UspConfigError, UspError, printable
from ...planner.request import shape_of
from ...sharding.degrees import check_degrees, choose_ulysses_degree
from ...utils.dtypes import DTYPES, check_dtype
from ...utils.validation import check_positive_int, check_writable, size_from_environment
from .environment import facts
from .exactness import core_error, model_error, small_config
from .issues import PROBLEM, Finding, Transfer, differing_versions, shared_devices, slow_links, wrong_placement
from .links import exchanges, pairs, speed
from .machine import measured_machine
from .results import CheckOptions, Results
from .summary import verdict
from .watchdog import Stages

MOST_MINUTES = 7 * 24 * 60
MOST_RANKS = 1 << 20


def run(options: CheckOptions) -> int:
    """Check this cluster; returns 0, or 1 where something is wrong. A hanging rank ends the process with 3.

    Raises `UspConfigError`, before any rank talks to another, for options that fit nothing.
    """
    world = size_from_environment("WORLD_SIZE", os.environ, least=1, most=MOST_RANKS)
    rank = size_from_environment("RANK", os.environ, 0, most=world - 1)
    results = Results(command=" ".join(sys.argv), world=world)
    _check_options(options, rank, world)
    config = None if options.model is None else small_config(options.model)
    heads = _heads(options, config)

    def say(texts: list[str]) -> None:
        results.findings += [
            Finding(PROBLEM, text, "look at that process: py-spy dump --pid, dmesg, nvidia-smi") for text in texts
        ]
        _tell(results, options)

    stages = Stages(rank, world, options.timeout, say)
    device, dtype = _device(), DTYPES[options.dtype]
    with stages.stage("versions"):
        texts = stages.exchange("facts", json.dumps(facts(device, dtype, heads[2])))
        results.facts = [json.loads(text) for text in texts]
    _look_around(results, options, heads)
    if world > 1:
        with stages.stage("process group"):
            backend = "nccl" if device.type == "cuda" else "gloo"
            store = dist.PrefixStore("group", stages.store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(days=1))
            dist.all_reduce(torch.ones(1, device=device))
    meshes = _measure(stages, results, options, device, dtype)
    _exactness(stages, results, config, heads, meshes, device, dtype)
    _soak(stages, results, options, heads, meshes, device, dtype)
    stages.done()
    if rank == 0:
        _tell(results, options)
    stages.meet("told")  # rank 0 may hold the store
    if dist.is_initialized():
        dist.destroy_process_group()
    return results.exit_code


def _check_options(options: CheckOptions, rank: int, world: int) -> None:
    names = {"cp_size": 20, "ulysses": 20, "heads": 16, "kv_heads": 16, "head_dim": 14, "ranks_per_node": 20}
    for name, bits in {**names, "message": 36}.items():
        check_positive_int(most=1 << bits, **{name: getattr(options, name)})
    check_dtype(options.dtype)
    if not 1 <= options.timeout <= MOST_MINUTES * 60:
        raise UspConfigError(
            f"timeout={options.timeout}",
            rule="a stage may take 1 second to a week",
            remedy="leave --timeout out (120 seconds), or give it more",
        )
    if not 0 <= options.soak_minutes <= MOST_MINUTES:
        raise UspConfigError(
            f"a soak of {options.soak_minutes} minutes",
            rule="a soak lasts between 0 minutes and a week",
            remedy=f"give it 0 to {MOST_MINUTES:,} minutes, for example --soak-minutes 10",
        )
    if not 0 < options.slow < 1:
        raise UspConfigError(
            f"slow={options.slow}",
            rule="a link is slow below a share of the usual bandwidth, between 0 and 1",
            remedy="leave --slow out (0.5), or give such a share",
        )
    size = options.cp_size or world
    if world % size:
        raise UspConfigError(
            f"cp_size = {size} in a world of {world} ranks",
            rule="it divides the number of ranks",
            remedy=f"one of {', '.join(str(d) for d in range(1, world + 1) if world % d == 0)}",
        )
    if options.ulysses is not None:
        check_degrees(size, options.ulysses)
    if options.output is not None and rank == 0:
        check_writable(options.output)


def _heads(options: CheckOptions, config: Any) -> tuple[int, int, int]:
    """Query heads, kv heads, width: the model's where there is one."""
    if config is None:
        return options.heads, options.kv_heads, options.head_dim
    shape = shape_of(config)
    return shape.heads, shape.kv_heads, shape.head_dim


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(size_from_environment("LOCAL_RANK", os.environ, 0, most=torch.cuda.device_count() - 1))
    return torch.device("cuda", torch.cuda.current_device())


def _look_around(results: Results, options: CheckOptions, heads: tuple[int, int, int]) -> None:
    """Findings before any tensor is sent."""
    hosts = [fact["host"] for fact in results.facts]
    node = options.ranks_per_node
    results.nodes = hosts if node is None else [rank // node for rank in range(results.world)]
    results.cp_size = options.cp_size or results.world
    counts = [results.nodes.count(name) for name in dict.fromkeys(results.nodes)]
    if options.ulysses is None:
        results.ulysses, results.reason = choose_ulysses_degree(results.cp_size, *heads[:2], min(counts))
    else:
        results.ulysses, results.reason = options.ulysses, "given"
    results.findings += differing_versions(results.facts) + shared_devices(results.facts)
    results.findings += wrong_placement(results.nodes, results.cp_size, results.ulysses)


def _measure(
    stages: Stages, results: Results, options: CheckOptions, device: torch.device, dtype: torch.dtype
) -> dict[int, UspMesh]:
    """Links and rates; returns the meshes of all candidate placements by their ulysses degree."""
    size = options.message or (2**26 if device.type == "cuda" else 2**21)
    mine: list[Transfer] = []
    meshes: dict[int, UspMesh] = {}
    if results.world == 1:
        meshes[1] = UspMesh.build(ring_degree=1, ulysses_degree=1)
    else:
        with stages.stage("links between pairs of ranks"):
            mine += pairs(device, size, results.nodes)
        for degree in (d for d in range(1, results.cp_size + 1) if results.cp_size % d == 0):
            ring = results.cp_size // degree
            with stages.stage(f"exchanges of ulysses {degree} x ring {ring}"):
                meshes[degree] = UspMesh.build(ring_degree=ring, ulysses_degree=degree)
                mine += exchanges(meshes[degree], device, size, results.nodes)
    with stages.stage("speed of every rank"):
        rates = stages.exchange("speed", json.dumps(speed(device, dtype)))
        results.speed = [json.loads(text) for text in rates]
        texts = stages.exchange("links", json.dumps([asdict(transfer) for transfer in mine]))
    found = [Transfer(**{**t, "ranks": tuple(t["ranks"])}) for text in texts for t in json.loads(text)]
    results.transfers = sorted(found, key=lambda t: (t.kind, len(t.ranks), t.ranks))
    results.findings += slow_links(results.transfers, options.slow) + _slow_ranks(results.speed, options.slow)
    return meshes


def _slow_ranks(rates: Sequence[dict[str, float]], slow: float) -> list[Finding]:
    usual = median(rate["flops"] for rate in rates)
    return [
        Finding(
            "warning",
            f"rank {rank} computes {rate['flops'] / 1e12:.3g} TFLOP/s, the others {usual / 1e12:.3g}",
            "look at clocks, heat and what else runs there",
        )
        for rank, rate in enumerate(rates)
        if len(rates) > 2 and rate["flops"] < slow * usual
    ]


def _exactness(
    stages: Stages,
    results: Results,
    config: Any,
    heads: tuple[int, int, int],
    meshes: dict[int, UspMesh],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """The core on every mesh, the model on the chosen one."""
    for degree, mesh in meshes.items():
        name = f"core, ulysses {degree} x ring {mesh.ring_degree}"
        with stages.stage(f"exactness of the {name}"):
            _judge(stages, results, name, core_error(mesh, device, dtype, heads))
    if config is None:
        return
    mesh = meshes[results.ulysses]
    name = f"{type(config).__name__.removesuffix('Config')} (small copy), ulysses {results.ulysses}"
    with stages.stage("exactness of the model"):
        try:
            error = model_error(config, mesh, device, dtype)
        except UspError as refusal:
            results.refused = str(refusal)
            results.findings.append(Finding(PROBLEM, f"the model is refused: {refusal}"))
            return
        _judge(stages, results, name, error)


def _judge(stages: Stages, results: Results, name: str, error: float) -> None:
    errors = [float(text) for text in stages.exchange(f"exact/{name}", repr(error))]
    results.exactness[name] = max(errors)
    wrong = [rank for rank, value in enumerate(errors) if not value <= 1]
    if wrong:
        results.findings.append(
            Finding(
                PROBLEM,
                f"wrong: {name} errs {max(errors):.3g} times what is allowed, seen by rank(s) {wrong}",
                "do not train here; try kernel='eager', then another driver or NCCL, and report it",
            )
        )


def _soak(
    stages: Stages,
    results: Results,
    options: CheckOptions,
    heads: tuple[int, int, int],
    meshes: dict[int, UspMesh],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """The core again and again on the chosen mesh, for some minutes."""
    seconds = options.soak_minutes * 60
    if not seconds:
        return
    worst, rounds, slowest, start = 0.0, 0, 0.0, time.monotonic()
    with stages.stage("soak", seconds):
        while True:
            began = time.monotonic()
            worst = max(worst, core_error(meshes[results.ulysses], device, dtype, heads))
            rounds, slowest = rounds + 1, max(slowest, time.monotonic() - began)
            # Rank 0's clock decides for all.
            if stages.exchange(f"soak/{rounds}", str(time.monotonic() - start > seconds))[0] == "True":
                break
        elapsed = time.monotonic() - start
        _judge(stages, results, f"soak of {rounds} rounds", worst)
    results.soak = {"seconds": elapsed, "rounds": rounds, "slowest_round": slowest}


def _tell(results: Results, options: CheckOptions) -> None:
    """The verdict on the screen, everything in the file."""
    print(printable(verdict(results, options.slow)), flush=True)
    if options.output is not None:
        content = {
            "hf_usp check": 1,
            "python": platform.python_version(),
            **asdict(results),
            "machine": measured_machine(results),
            "exit_code": results.exit_code,
        }
        Path(options.output).write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")
        print(f"everything in {options.output}", flush=True)
