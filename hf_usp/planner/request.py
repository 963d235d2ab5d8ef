"""From a model's name, a machine's name and numbers to the sizes that the roofline computes with; refuses the rest."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..errors import UspConfigError, UspError, printable
from ..utils.validation import check_number, check_positive_int
from .hardware import MACHINES, Link, Machine, check_machine
from .workload import Indexer, ModelShape, TrainingStep

# Of a GPU's memory: the rest goes to the CUDA context, NCCL and fragmentation.
USABLE = 0.92
AUTO_CHUNK = 4096  # tokens of a chunk of a layer with memory="auto"
USABLE_HOST = 0.85  # of a node's host memory: the rest goes to processes, data loaders and the page cache
# Where AdamW keeps its state: bytes a parameter, an fp32 copy of the weights included; whether all is in host memory.
OPTIMIZERS = {"fp32": (12, False), "bf16": (4, False), "cpu": (12, True)}
# Families that normalise queries and keys head by head; their configs do not say so.
HEAD_NORMS = {"qwen3", "qwen3_moe", "qwen3_next", "gemma3", "gemma3_text", "gemma3n_text", "olmo2", "olmo3", "exaone4"}
SELECTING = {"indexed_attention", "minimax_m3_sparse"}  # types of layers whose queries select their keys
MOST_SIZE = 1 << 32  # of whatever a config counts
MOST_TOKENS, MOST_GPUS, MOST_ROWS, MOST_IN_A_NODE = 1 << 31, 1 << 17, 1 << 16, 1 << 10


@dataclass(frozen=True)
class PlanRequest:
    """Sizes to plan for.

    Attributes:
        name: name of the model, for the launch line.
        model: its sizes.
        machine: rates of a rank, and links.
        tokens: tokens of a row.
        gpus: number of ranks.
        budget: bytes of a rank that a run may use.
        rows: rows of a replica.
        documents: lengths of the documents that a row is packed from.
        most_tp: largest tensor-parallel degree; None: no limit.
        allow_offload: also consider checkpoints in host memory.
        mlp_chunk_size: also consider MLPs in chunks of so many tokens.
        layer_chunk_size: also consider layers in chunks of so many tokens, where ranks share a row.
        keep_attention: in such layers also consider attention's output kept in host memory.
        auto: consider what `UspParallelismConfig(memory="auto")` chooses from.
        like: step whose other fields (kernel, optimizer, ring, accumulation) are planned for.
        host_budget: bytes of host memory that a rank may use.
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
    mlp_chunk_size: int | None = None
    layer_chunk_size: int | None = None
    keep_attention: bool = False
    auto: bool = False
    like: TrainingStep = TrainingStep(1)
    host_budget: float = math.inf

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
    host_memory_gb: float | None = None,
    rows: int = 1,
    documents: tuple[int, ...] = (),
    most_tp: int | None = None,
    allow_offload: bool = False,
    mlp_chunk_size: int | None = None,
    layer_chunk_size: int | None = None,
    auto: bool = False,
    accumulate: bool = False,
    optimizer: str = "fp32",
    kernel: str | None = None,
) -> PlanRequest:
    """Check every number, find model and machine. Raises `UspConfigError`, naming what is wrong."""
    check_positive_int(most=MOST_TOKENS, required=True, tokens=tokens)
    check_positive_int(most=MOST_GPUS, required=True, gpus=gpus)
    check_positive_int(most=MOST_ROWS, required=True, rows=rows)
    check_positive_int(most=MOST_IN_A_NODE, gpus_per_node=gpus_per_node, tp=most_tp)
    check_positive_int(most=MOST_TOKENS, mlp_chunk_size=mlp_chunk_size, layer_chunk_size=layer_chunk_size)
    _check_words(model, documents, optimizer)
    found = _with_memory(find_machine(machine, gpus_per_node), memory_gb, host_memory_gb)
    if gpus > found.ranks_per_node and gpus % found.ranks_per_node:
        raise UspConfigError(
            f"{gpus} GPUs on nodes of {found.ranks_per_node}",
            rule="several nodes are full ones",
            remedy=f"choose {gpus // found.ranks_per_node * found.ranks_per_node} GPUs, or pass --gpus-per-node",
        )
    found.rate(kernel)
    size, on_host = OPTIMIZERS[optimizer]
    kernel = next(iter(found.kernels)) if kernel is None else kernel
    like = TrainingStep(1, accumulate=accumulate, optimizer=size, offload_states=on_host, kernel=kernel)
    shape = read_model(model)
    if shape.indexer and documents and max(documents) <= shape.indexer.selected:
        shape = replace(shape, indexer=None)  # every query selects all that it sees
    return PlanRequest(
        model,
        shape,
        found,
        tokens,
        gpus,
        found.memory * USABLE,
        rows,
        documents,
        most_tp,
        allow_offload or auto,
        None if auto else mlp_chunk_size,
        AUTO_CHUNK if auto else layer_chunk_size,
        keep_attention=auto or layer_chunk_size is not None,
        auto=auto,
        like=replace(like, shard_params=gpus > 1 or on_host),
        host_budget=found.host_memory * USABLE_HOST / min(found.ranks_per_node, gpus),
    )


def _check_words(model: str, documents: tuple[int, ...], optimizer: str) -> None:
    if not model.isprintable():
        raise UspConfigError(
            f"a model {model!r}",
            rule="its name stands in the launch line",
            remedy="rename the folder: letters without line breaks and control characters",
        )
    check_positive_int(most=MOST_TOKENS, documents=max(documents, default=1))
    if documents and min(documents) < 1:
        raise UspConfigError(
            f"a document of {min(documents)} tokens",
            rule="every document has a token",
            remedy="give --documents lengths of 1 or more",
        )
    if optimizer not in OPTIMIZERS:
        raise UspConfigError(
            f"optimizer = {optimizer!r:.100}",
            rule=f"the state of AdamW is one of {', '.join(OPTIMIZERS)}",
            remedy="pass --optimizer fp32, say (16 bytes a parameter in all)",
        )


def _with_memory(machine: Machine, device: float | None, host: float | None) -> Machine:
    """The same machine with other memory, in gigabytes: of a GPU, and of a node's host."""
    for option, size in (("memory", device), ("host-memory", host)):
        if size is not None and not (math.isfinite(size) and 0 < size <= 100_000):
            raise UspConfigError(
                f"{option} = {size} GB",
                rule="it is in gigabytes, more than 0 and at most 100,000",
                remedy=f"pass --{option} 80, say, or leave it out to take the machine's",
            )
    machine = machine if device is None else replace(machine, memory=device * 1e9)
    return machine if host is None else replace(machine, host_memory=host * 1e9)


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
        name = str(content["name"])
        check_number(**{key: content[key] for key in ("matmul_flops", "memory", "memory_bandwidth")})
        for link in content["links"]:
            check_positive_int(required=True, most=MOST_GPUS, ranks=link["ranks"])
            check_number(bandwidth=link["bandwidth"], latency=link["latency"])
        links = tuple(Link(link["ranks"], link["bandwidth"], None, link["latency"]) for link in content["links"])
        # The roofline asks for the peak and knows what long products reach of it.
        like = "cpu" if name.startswith("cpu") else "h100-nvlink"
        share, rates = MACHINES["cpu"].matmul, MACHINES[like].kernels.items()
        return replace(
            MACHINES[like],
            name=printable(name),
            flops=content["matmul_flops"] / share,
            memory=float(content["memory"]),
            host_memory=float(content.get("host_memory", MACHINES[like].host_memory)),
            kernels={
                kernel: replace(rate, source=f"unknown there, taken to be {like}'s share") for kernel, rate in rates
            },
            memory_bandwidth=content["memory_bandwidth"],
            links=_far_enough(links),
        )
    except OSError as problem:
        raise UspConfigError(
            f"machine {path!r}: {problem.strerror}",
            rule="a machine's file can be read",
            remedy="pass the path that hf-usp check --output wrote, or a preset's name (an unknown one lists them)",
        ) from problem
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        found = f" ({problem.found})" if isinstance(problem, UspError) else ""
        raise UspConfigError(
            f"machine {path!r} holds no measured machine{found}",
            rule="it is the file of hf-usp check --output",
            remedy="run hf-usp check --output check.json on several ranks",
        ) from problem


def _far_enough(links: tuple[Link, ...]) -> tuple[Link, ...]:
    """More nodes of the same kind: the outermost link reaches them."""
    if not links or any(a.ranks >= b.ranks for a, b in pairwise(links)):
        raise ValueError("no links, or not from the inside to the outside")
    outer = replace(links[-1], ranks=MOST_GPUS)
    return (*links[:-1], outer) if len(links) > 1 else (links[0], outer)


def read_model(name: str) -> ModelShape:
    """Sizes of a decoder: a folder, a config.json, or a hub name in the local cache (the network is never asked)."""
    config = read_config(name)
    check_decoder(config)
    return shape_of(config)


def read_config(name: str, *, local: bool = True) -> Any:
    """The config of such a model; with `local=False` it may also be downloaded. Code of a model is never run.

    Raises `UspConfigError` where it is not there, holds what Transformers does not take, or needs code of its own.
    """
    try:
        return AutoConfig.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    except Exception as problem:  # a config holds whatever somebody wrote; Transformers looks at some of it only
        reason = printable(str(problem).strip().split("\n")[0][:200])
        if "trust_remote_code" in str(problem):
            raise UspConfigError(
                f"{name!r} has code of its own (auto_map in its config.json)",
                rule="a model's code is not run here, only architectures of Transformers are known",
                remedy="pass a config.json whose model_type is the architecture of Transformers that it is like",
            ) from problem
        missing = isinstance(problem, OSError) and not os.path.exists(name)
        what = "no config of" if missing else "no config that Transformers takes in"
        raise UspConfigError(
            f"{what} {name!r:.200} on this machine ({type(problem).__name__}: {reason})",
            rule="a model is a folder, a config.json, or a hub name in the local cache",
            remedy=f"hf download {name:.200} config.json, or pass a path" if missing else "mend its config.json",
        ) from problem


def check_decoder(config: Any) -> None:
    """Raise `UspConfigError` for encoders, and for what reads one sequence and writes another."""
    from transformers.models.auto import modeling_auto as auto  # not needed to import hf_usp

    known = {*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    encoder = config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if encoder or getattr(config, "is_encoder_decoder", False) or config.model_type not in known:
        raise UspConfigError(
            f"a config of type {config.model_type!r}",
            rule="hf-usp plan knows decoders: causal language models",
            remedy="pass the config.json of one; UspParallelismConfig(ulysses_degree=...) itself takes encoders, too",
        )


def shape_of(config: Any) -> ModelShape:
    """Sizes of a config. Layers with a state along the sequence count as layers with full attention; sizes that differ
    between layers count with their mean. Raises `UspConfigError` for sizes that no model has."""
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
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "num_key_value_heads")
    inner = ("intermediate_size", "moe_intermediate_size", "num_experts_per_tok")
    check_positive_int(most=MOST_SIZE, **{name: get(name) for name in (*names, *inner)})
    # 0 where a family has none: experts, a window, one width for keys and values of latent attention.
    counts = ("num_experts", "num_local_experts", "n_routed_experts")
    check_positive_int(least=0, most=MOST_SIZE, **{name: get(name) for name in (*counts, "sliding_window")})
    check_positive_int(least=0 if get("kv_lora_rank") else 1, most=MOST_SIZE, head_dim=get("head_dim"))
    experts = get(*counts) or 1
    width = get("moe_intermediate_size") if experts > 1 else None
    types = getattr(text, "layer_types", None) or []
    window = get("sliding_window")
    sliding = (
        types.count("sliding_attention")
        if types
        else layers * bool(window and get("use_sliding_window") in (None, True))
    )
    return ModelShape(
        layers=layers,
        hidden=hidden,
        intermediate=width or get("intermediate_size") or 4 * hidden,
        heads=heads,
        kv_heads=get("num_key_value_heads") or heads,
        head_dim=get("head_dim") or max(1, hidden // heads),
        vocab=text.vocab_size,
        tied=bool(getattr(text, "tie_word_embeddings", False)),
        experts=experts,
        active=(get("num_experts_per_tok") or 1) if experts > 1 else 1,
        window=window if sliding else None,
        sliding_layers=sliding if window else 0,
        head_norms=text.model_type in HEAD_NORMS or bool(get("use_qk_norm")),
        indexer=_indexer_of(get, types, getattr(text, "indexer_types", None) or []),
    )


def _indexer_of(get: Callable[..., Any], types: list[str], indexers: list[str]) -> Indexer | None:
    """How layers select their keys; None where none does. Compressed entries (DeepSeek-V4) are not counted as such.

    types: of all layers. indexers: which of them make a selection, where some take over that of a layer before.
    """
    blocks = get("index_topk_blocks")
    selected = blocks * (get("index_block_size") or 1) if blocks else get("index_topk", "indexer_budget")
    layers = sum(kind in SELECTING for kind in types)
    if not selected or not layers:
        return None
    latent, rotary = get("kv_lora_rank"), get("qk_rope_head_dim") or 0
    head_dim = get("head_dim") or get("hidden_size") // get("num_attention_heads")
    numbers = {
        "layers": layers,
        "scoring": indexers.count("full") or layers,
        "selected": selected,
        "heads": get("index_n_heads", "indexer_n_heads"),
        "width": get("index_head_dim", "indexer_head_dim"),
        "gathered": latent + rotary if latent else 2 * head_dim * (get("num_key_value_heads") or 1),
        "products": 2 * latent + rotary if latent else 2 * head_dim,
    }
    check_positive_int(most=MOST_SIZE, required=True, **numbers)
    return Indexer(**numbers)


def text_config(config: Any) -> Any:
    """The decoder's part of a config. Raises `UspConfigError` where there are several."""
    try:
        text = config.get_text_config()
        text.model_type  # noqa: B018
        return text
    except (ValueError, TypeError, AttributeError) as problem:
        raise UspConfigError(
            f"a config of type {config.model_type!r} with several language models, or none",
            rule="one decoder is planned for",
            remedy="pass the config of that decoder",
        ) from problem


def size_of(text: Any, name: str) -> Any:
    """An attribute of a config; of numbers that differ between layers the mean, rounded."""
    try:
        value = getattr(text, name, None)
    except RuntimeError:  # Transformers does not read from the whole config what differs between layers
        value = [getattr(layer, name, None) for layer in text.per_layer_config]
    numbers = [x for x in value if isinstance(x, int)] if isinstance(value, list | tuple) else []
    return round(sum(numbers) / len(numbers)) if numbers else value
