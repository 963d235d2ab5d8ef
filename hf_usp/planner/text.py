"""A plan as a table, as an Accelerate config with its launch line, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from shlex import quote
from typing import Any

from .request import PlanRequest
from .search import Candidate, longest, longest_of_all

MOST = 12


def table(what: PlanRequest, found: list[Candidate]) -> str:
    """The best splits, a line each."""
    node = f", {what.node} a node" if what.gpus > what.node else ""
    lines = [
        f"{what.name}: {what.model.params / 1e9:.2f} B parameters, rows of {what.tokens:,} tokens, {what.gpus} x "
        f"{what.machine.name}{node}, {what.budget / 1e9:.0f} GB usable a rank, "
        f"{what.host_budget / 1e9:.0f} GB of the host",
        _kernel(what),
        *_selection(what),
        "",
        f"{'tp':>3} {'ulysses':>7} {'ring':>4} {'data':>4} {'step':>9} {'exposed':>8} {'tokens/s':>10} {'MFU':>6} "
        f"{'memory':>9}  saving memory by; limited by",
    ]
    for candidate in found[:MOST]:
        d, it = candidate.degrees, candidate.prediction
        fits = "" if candidate.fits else "  DOES NOT FIT"
        lines.append(
            f"{d.tp:>3} {d.ulysses:>7} {d.ring:>4} {d.dp_shard:>4} {it.seconds:>7.2f} s "
            f"{it.exposed / it.seconds:>8.1%} "
            f"{it.tokens_per_second:>10,.0f} {it.mfu:>6.1%} {it.memory.total / 1e9:>6.1f} GB  {candidate.savings}; "
            f"{candidate.limit}{fits}"
        )
    if len(found) > MOST:
        lines.append(f"... and {len(found) - MOST} more (--json)")
    best = found[0]
    lines += [
        "",
        f"memory of the best, GB a rank, each kind at its largest (peak: {best.prediction.memory.peak}):  "
        + "  ".join(f"{k} {v / 1e9:.2f}" for k, v in best.prediction.memory.kinds.items()),
    ]
    if best.prediction.memory.host:
        lines.append(f"host memory of the best: {best.prediction.memory.host / 1e9:.0f} GB a rank")
    if best.prediction.host > best.prediction.seconds:
        lines.append(
            f"bound by the host: it takes {best.prediction.host:.2f} s to launch what the device computes in "
            f"{best.prediction.seconds:.2f} s (predicted); more tokens a rank or a shorter ring use the device"
        )
    reach, d = longest_of_all(what)
    lines.append(
        f"the longest row of this split: {longest(what, best.degrees):,} tokens; of any: {reach:,} (tp {d.tp}, ulysses "
        f"{d.ulysses}, ring {d.ring}, data {d.dp_shard})"
    )
    return "\n".join(lines)


def _kernel(what: PlanRequest) -> str:
    """The attention kernel that is assumed, and who measured its rate."""
    rate = what.machine.rate(what.like.kernel)
    source = f" ({rate.source})" if rate.source else ""
    backward = f"{rate.full * rate.backward:.0%} backward"
    return f"attention by {what.like.kernel}: {rate.full:.0%} of the peak, {backward}{source}"


def _selection(what: PlanRequest) -> list[str]:
    """Of layers whose queries select their keys: the assumptions."""
    it = what.model.indexer
    if it is None or what.tokens <= it.selected:
        return []
    return [
        f"in {it.layers} of {what.model.layers} layers queries select {it.selected:,} keys: they are gathered in plain "
        "PyTorch, bound by memory bandwidth; memory is that of full attention"
    ]


def accelerate_config(what: PlanRequest, best: Candidate, path: str = "plan.yaml") -> str:
    """A config file for `accelerate launch`, its launch line in its head."""
    nodes = max(1, what.gpus // what.node)
    line = [f"accelerate launch --config_file {quote(path)}"]
    if nodes > 1:
        line[0] += " --machine_rank 0 --main_process_ip 10.0.0.1"
    line.append(f"scripts/finetune.py {' '.join(map(quote, flags(what, best)))}")
    shared = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP" if best.job.shard_params and best.degrees.tp == 1 else "MULTI_GPU",
        "num_machines": nodes,
        "num_processes": what.gpus,
        "machine_rank": 0,
        "gpu_ids": "all",
        "mixed_precision": "bf16" if what.like.optimizer == 12 else "'no'",
        "main_training_function": "main",
    }
    if nodes > 1:
        shared["main_process_port"] = 29500
    text = "# " + " \\\n#   ".join(line) + "\n" + "".join(f"{key}: {value}\n" for key, value in shared.items())
    if shared["distributed_type"] == "FSDP":
        text += (
            "fsdp_config:\n  fsdp_version: 2\n  fsdp_reshard_after_forward: true\n"
            "  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP\n  fsdp_cpu_ram_efficient_loading: true\n"
            "  fsdp_state_dict_type: SHARDED_STATE_DICT\n"
        )
        if best.job.offload_states:
            text += "  fsdp_offload_params: true\n"
        if best.job.offload:
            text += "  fsdp_activation_checkpointing: false\n"
    return text


def flags(what: PlanRequest, best: Candidate) -> list[str]:
    """Of scripts/finetune.py."""
    d = best.degrees
    given = [
        *(["--bf16"] if what.like.optimizer == 12 else ["--dtype", "bfloat16"]),
        "--model_name_or_path",
        what.name,
        "--train_file",
        "corpus/",
        "--sequence_length",
        str(what.tokens),
        "--per_device_train_batch_size",
        str(what.rows),
        "--context-parallel-size",
        str(d.cp),
    ]
    if d.cp > 1:
        given += ["--context-parallel-algo", "hybrid_cp_algo", "--ulysses-degree-in-cp", str(d.ulysses)]
    if d.tp > 1:
        given += ["--tensor-model-parallel-size", str(d.tp)]
    if what.auto:
        return [*given, "--memory", "auto"]
    if best.job.checkpointing:
        given.append("--activation_checkpointing")
    if best.job.loss_chunk_size:
        given += ["--loss-chunk-size", str(best.job.loss_chunk_size)]
    if best.job.layer_chunk_size:
        given += ["--layer-chunk-size", str(best.job.layer_chunk_size), "--head-groups", str(best.job.head_groups)]
    if best.job.keep_attention:
        given += ["--keep-attention", str(best.job.keep_attention)]
    if best.job.mlp_chunk_size:
        given += ["--mlp-chunk-size", str(best.job.mlp_chunk_size)]
    if best.job.offload:
        given.append("--offload-checkpoints")
    return given


def as_json(what: PlanRequest, found: list[Candidate]) -> dict[str, Any]:
    """Everything, for programs."""
    rows = []
    for candidate in found:
        it = candidate.prediction
        rows.append(
            {
                **asdict(candidate.degrees),
                "fits": candidate.fits,
                "checkpointing": candidate.job.checkpointing,
                "offload": candidate.job.offload,
                "loss_chunk_size": candidate.job.loss_chunk_size,
                "mlp_chunk_size": candidate.job.mlp_chunk_size,
                "layer_chunk_size": candidate.job.layer_chunk_size,
                "head_groups": candidate.job.head_groups,
                "keep_attention": candidate.job.keep_attention,
                "seconds": it.seconds,
                "exposed_seconds": it.exposed,
                "tokens_per_second": it.tokens_per_second,
                "mfu": it.mfu,
                "memory": it.memory.kinds,
                "memory_at_peak": it.memory.at_peak,
                "peak": it.memory.peak,
                "memory_total": it.memory.total,
                "host_memory": it.memory.host,
                "limit": candidate.limit,
            }
        )
    best = found[0]
    return {
        "model": {"name": what.name, "parameters": what.model.params, **asdict(what.model)},
        "machine": what.machine.name,
        "tokens": what.tokens,
        "gpus": what.gpus,
        "gpus_per_node": what.node,
        "budget": what.budget,
        "host_budget": what.host_budget,
        "kernel": {"name": what.like.kernel, **asdict(what.machine.rate(what.like.kernel))},
        "documents": list(what.documents),
        "longest": longest(what, best.degrees),
        "longest_of_all": longest_of_all(what)[0],
        "flags": flags(what, best),
        "splits": rows,
    }
