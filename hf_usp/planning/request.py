"""From a model's name, a machine's name and numbers to the sizes that the roofline computes with; refuses the rest."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..costs.machines import MACHINES, Link, Machine, check_machine
from ..costs.sizes import Job, ModelShape
from ..errors import UspConfigError
from ..integers.whole import check_whole

# Of a GPU's memory: the rest goes to the CUDA context, NCCL and fragmentation.
USABLE = 0.92
MOST_TOKENS, MOST_GPUS, MOST_ROWS, MOST_IN_A_NODE = 1 << 31, 1 << 17, 1 << 16, 1 << 10


@dataclass(frozen=True)
class PlanRequest:
    """What to plan for. budget: bytes of a rank that a run may use. documents: lengths that rows are packed from.

    allow_offload: also consider checkpoints in host memory. mlp_chunk: also consider MLPs in chunks of so many tokens.
    name: of the model, for the launch line. like: a job whose ring and accumulation (relay, gradients, overlap,
    accumulate) are planned for; the default is this library's.
    """

    name: str
    model: ModelShape
    machine: Machine
    tokens: int
    gpus: int
    budget: float
    rows: int = 1
    documents: tuple[int, ...] = ()
    most_tp: int | None = None
    allow_offload: bool = False
    mlp_chunk: int | None = None
    optimizer: int = 12
    like: Job = Job(1)

    @property
    def node(self) -> int:
        """GPUs of a node."""
        return min(self.machine.ranks_per_node, self.gpus)


def request(
    model: str,
    *,
    tokens: int,
    gpus: int,
    machine: str,
    gpus_per_node: int | None = None,
    memory_gb: float | None = None,
    rows: int = 1,
    documents: tuple[int, ...] = (),
    most_tp: int | None = None,
    allow_offload: bool = False,
    mlp_chunk: int | None = None,
    accumulate: bool = False,
) -> PlanRequest:
    """Check every number, find model and machine. Raises `UspConfigError`, naming what is wrong."""
    check_whole(most=MOST_TOKENS, required=True, tokens=tokens)
    check_whole(most=MOST_GPUS, required=True, gpus=gpus)
    check_whole(most=MOST_ROWS, required=True, rows=rows)
    check_whole(most=MOST_IN_A_NODE, gpus_per_node=gpus_per_node, tp=most_tp)
    check_whole(most=MOST_TOKENS, mlp_chunk=mlp_chunk)
    if memory_gb is not None and not (math.isfinite(memory_gb) and 0 < memory_gb <= 100_000):
        raise UspConfigError(
            f"memory = {memory_gb} GB",
            rule="it is in gigabytes of one device, more than 0 and at most 100,000",
            remedy="pass --memory 80, say, or leave it out to take the machine's",
        )
    if documents and min(documents) < 1:
        raise UspConfigError(
            f"a document of {min(documents)} tokens",
            rule="every document has a token",
            remedy="give --documents lengths of 1 or more",
        )
    found = find_machine(machine, gpus_per_node)
    if memory_gb is not None:
        found = replace(found, memory=memory_gb * 1e9)
    if gpus > found.ranks_per_node and gpus % found.ranks_per_node:
        raise UspConfigError(
            f"{gpus} GPUs on nodes of {found.ranks_per_node}", rule="several nodes are full ones",
            remedy=f"choose {gpus // found.ranks_per_node * found.ranks_per_node} GPUs, or pass --gpus-per-node",
        )  # fmt: skip
    shape = read_model(model)
    return PlanRequest(
        model, shape, found, tokens, gpus, found.memory * USABLE, rows, documents, most_tp, allow_offload,
        mlp_chunk, like=Job(1, accumulate=accumulate),
    )  # fmt: skip


def find_machine(name: str, gpus_per_node: int | None = None) -> Machine:
    """A preset by its name, or what `hf-usp check --output` measured by the path of its file."""
    if name.endswith(".json"):
        found = _measured(name)
    else:
        check_machine(name)
        found = MACHINES[name]
    return found if gpus_per_node is None else with_nodes_of(found, gpus_per_node)


def with_nodes_of(found: Machine, gpus_per_node: int) -> Machine:
    """The same machine with larger or smaller nodes."""
    if gpus_per_node == found.ranks_per_node:
        return found
    inside = [link for link in found.links[:-1] if link.ranks < gpus_per_node] or []
    widest = found.links[max(0, len(found.links) - 2)]
    return replace(found, links=(*inside, replace(widest, ranks=gpus_per_node), found.links[-1]))


def _measured(path: str) -> Machine:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))["machine"]
        links = tuple(Link(link["ranks"], link["bandwidth"], None, link["latency"]) for link in content["links"])
        # The roofline asks for the peak and knows what long products reach of it.
        share = MACHINES["cpu"].matmul
        return replace(
            MACHINES["cpu" if content["name"].startswith("cpu") else "h100-nvlink"],
            name=content["name"], flops=content["matmul_flops"] / share, memory=float(content["memory"]),
            memory_bandwidth=content["memory_bandwidth"], links=_far_enough(links),
        )  # fmt: skip
    except OSError as problem:
        raise UspConfigError(
            f"machine {path!r}: {problem.strerror}",
            rule="a machine's file can be read",
            remedy="pass the path that hf-usp check --output wrote, or a preset's name (an unknown one lists them)",
        ) from problem
    except (ValueError, KeyError, TypeError) as problem:
        raise UspConfigError(
            f"machine {path!r} holds no measured machine", rule="it is the file of hf-usp check --output",
            remedy="run hf-usp check --output check.json on several ranks",
        ) from problem  # fmt: skip


def _far_enough(links: tuple[Link, ...]) -> tuple[Link, ...]:
    """More nodes of the same kind: the outermost link reaches them."""
    if not links:
        raise ValueError("no links")
    outer = replace(links[-1], ranks=MOST_GPUS)
    return (*links[:-1], outer) if len(links) > 1 else (links[0], outer)


def read_model(name: str) -> ModelShape:
    """Sizes of a model: a folder, a config.json, or a hub name in the local cache (the network is never asked)."""
    return shape_of(read_config(name))


def read_config(name: str) -> Any:
    """The config of such a model. Raises `UspConfigError` where it is not on this machine, or cannot be read."""
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as problem:
        local = Path(name).exists()
        raise UspConfigError(
            f"no config of {name!r} on this machine ({str(problem).splitlines()[0]})",
            rule="a model is a folder, a config.json, or a hub name in the local cache",
            remedy="mend its config.json" if local else f"hf download {name} config.json, or pass a path",
        ) from problem


def shape_of(config: Any) -> ModelShape:
    """Sizes of a config. Layers with a state along the sequence count as layers with full attention; sizes that differ
    between layers count with their mean."""
    text = text_config(config)

    def get(*names: str) -> Any:
        return next((value for name in names if (value := size_of(text, name)) is not None), None)

    layers, hidden, heads = get("num_hidden_layers"), get("hidden_size"), get("num_attention_heads")
    if not all(isinstance(x, int) and x > 0 for x in (layers, hidden, heads, get("vocab_size"))):
        raise UspConfigError(
            f"a config of type {text.model_type!r} without layers, hidden size, heads or vocabulary",
            rule="hf-usp plan knows decoders of attention and MLP layers",
            remedy="pass the config.json of a causal language model, with num_hidden_layers, hidden_size, "
            "num_attention_heads and vocab_size",
        )
    experts = get("num_experts", "num_local_experts", "n_routed_experts") or 1
    width = get("moe_intermediate_size") if experts > 1 else None
    types = getattr(text, "layer_types", None) or []
    window = get("sliding_window")
    sliding = (
        types.count("sliding_attention")
        if types
        else layers * bool(window and get("use_sliding_window") in (None, True))
    )
    return ModelShape(
        layers=layers, hidden=hidden, intermediate=width or get("intermediate_size") or 4 * hidden, heads=heads,
        kv_heads=get("num_key_value_heads") or heads, head_dim=get("head_dim") or max(1, hidden // heads),
        vocab=text.vocab_size, tied=bool(getattr(text, "tie_word_embeddings", False)), experts=experts,
        active=(get("num_experts_per_tok") or 1) if experts > 1 else 1, window=window if sliding else None,
        sliding_layers=sliding if window else 0,
    )  # fmt: skip


def text_config(config: Any) -> Any:
    """The decoder's part of a config. Raises `UspConfigError` where there are several."""
    try:
        return config.get_text_config()
    except ValueError as problem:
        raise UspConfigError(
            f"a config of type {config.model_type!r} with several language models",
            rule="one decoder is planned for", remedy="pass the config of that decoder",
        ) from problem  # fmt: skip


def size_of(text: Any, name: str) -> Any:
    """An attribute of a config; of numbers that differ between layers the mean, rounded."""
    try:
        value = getattr(text, name, None)
    except RuntimeError:  # Transformers does not read from the whole config what differs between layers
        value = [getattr(layer, name, None) for layer in text.per_layer_config]
    numbers = [x for x in value if isinstance(x, int)] if isinstance(value, list | tuple) else []
    return round(sum(numbers) / len(numbers)) if numbers else value
