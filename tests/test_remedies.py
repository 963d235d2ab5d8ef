"""A remedy that is followed works: every refusal whose remedy names an option or a call is provoked, and then mended.

Keys are words of the remedies, as they stand in the sources; a law at the end finds remedies without a case.
"""

from __future__ import annotations

import ast
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist

import hf_usp
from hf_usp.batch.documents import find_documents
from hf_usp.callbacks import UspMetricsCallback
from hf_usp.memory.activation_offload import CHECKPOINTING
from hf_usp.models.find import find_model
from hf_usp.sharding.load_balance import fixed_assignment
from hf_usp.sharding.masks import Documents, Mask

from .harness import fresh_accelerate
from .ranks import Ranks
from .tiny import HYBRID, batch_of, rows, tiny_model


class Case(NamedTuple):
    """A refused call, and the same with the remedy followed. `followed` may compare: it returns a difference."""

    refused: Callable[[], Any]
    followed: Callable[[], Any]


def prepared(options: dict[str, Any] | None = None, model: Any = None, **changes: Any) -> tuple[Any, Any]:
    """An accelerator over two ranks and a prepared model."""
    from accelerate import Accelerator

    fresh_accelerate()
    config = hf_usp.UspParallelismConfig(cp_size=2, **(options or {}))
    accelerator = Accelerator(cpu=True, parallelism_config=config)
    return accelerator, accelerator.prepare((tiny_model(**changes) if model is None else model).train())


def off(batch: dict[str, Any], options: dict[str, Any] | None = None, **changes: Any) -> float:
    """How far a prepared model's loss is from that of one process; both have no attention weights."""
    # With a cache one process does not tell documents apart by position_ids.
    whole = tiny_model(attention="eager", use_cache=False, **changes).train()(**batch).loss.item()
    return abs(prepared(options, **changes)[1](**batch).loss.item() - whole)


def call(batch: dict[str, Any], options: dict[str, Any] | None = None, **changes: Any) -> Callable[[], Any]:
    return lambda: prepared(options, **changes)[1](**batch)


def exact(batch: dict[str, Any], options: dict[str, Any] | None = None, **changes: Any) -> Callable[[], Any]:
    return lambda: off(batch, options, **changes)


def manual_loop(
    batch: dict[str, Any], prepare: Callable[[Any], Any] = lambda m: m, family: str = "llama", **changes: Any
):
    """A call of a hand-written loop."""

    def run() -> float:
        model = tiny_model(family, **changes)
        prepare(model)
        mesh = hf_usp.UspMesh.build(ring_degree=2, ulysses_degree=1)
        loss = model(**hf_usp.shard(batch, mesh), use_cache=False).loss.detach() / 2
        dist.all_reduce(loss)
        return abs(loss.item() - tiny_model(family, "eager", **changes)(**batch, use_cache=False).loss.item())

    return run


PLAIN, PACKED, RIGHT = batch_of("plain"), batch_of("packed"), batch_of("right")
IDS = PLAIN["input_ids"]
ONES = torch.ones_like(IDS)
# Two documents and padding, told by numbers in the mask; then as the remedy has it.
NUMBERS = torch.tensor([1] * 20 + [2] * 12 + [0] * 5).expand(2, -1)
RESTART = torch.cat([torch.arange(20), torch.arange(12), torch.arange(5)]).expand(2, -1)
IGNORED = PLAIN["labels"].masked_fill(NUMBERS == 0, -100)
CU = torch.tensor([0, 20, 32, 37, 57, 69, 74], dtype=torch.int32)
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}


def without(batch: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in names}


def documents_apart() -> float:
    """Against the documents one by one, each row's two."""
    whole, total = tiny_model(attention="eager").train(), 0
    losses = []
    for row in range(2):
        for start, stop in ((0, 20), (20, 32)):
            labels = IGNORED[row : row + 1, start:stop]
            losses.append(whole(input_ids=IDS[row : row + 1, start:stop], labels=labels, num_items_in_batch=1).loss)
            total += int((labels[:, 1:] != -100).sum())
    # The first token of a document is predicted by the last of the one before it, unless its label is ignored.
    labels = IGNORED.clone()
    labels[:, [0, 20]] = -100
    mine = prepared()[1](input_ids=IDS, labels=labels, position_ids=RESTART).loss
    return abs(mine.item() - sum(losses).item() / total)


def loss_outside(gather: bool | None) -> float:
    """A loss outside the model of whole logits, averaged over ranks; the gradient of the head against one process."""
    _, model = prepared({"gather_outputs": gather})
    batch = without(PLAIN, "labels")
    gradients = []
    for subject in (model, tiny_model(attention="eager").train()):
        logits = subject(**batch).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, PLAIN["labels"][:, 1:].flatten()).backward()
        inner = getattr(subject, "module", subject)
        gradients.append(inner.model.embed_tokens.weight.grad)
    return (gradients[0] - gradients[1]).abs().max().item()


def peeking(options: dict[str, Any]) -> Any:
    from .models.spoiled import spoil

    return prepared(options, model=spoil(tiny_model(), "neighbour"))[1](**PLAIN)


def noisy(alpha: float | None) -> Any:
    _, model = prepared()
    if alpha is not None:
        model.module.get_input_embeddings().neftune_noise_alpha = alpha
    return model(**PLAIN)


def second_derivative(create_graph: bool) -> None:
    _, model = prepared()
    torch.autograd.grad(model(**PLAIN).loss, list(model.parameters()), create_graph=create_graph)


def normed(max_norm: float | None) -> Any:
    model = tiny_model()
    model.model.embed_tokens.max_norm = max_norm
    return prepared(model=model)[1](**PLAIN)


def offloaded(checkpointed: bool) -> Any:
    model = tiny_model()
    if checkpointed:
        getattr(model, f"{CHECKPOINTING}_enable")()
    return prepared({"offload_checkpoints": True}, model=model)[1](**PLAIN)


def metrics(**options: Any) -> Any:
    accelerator, model = prepared(options)
    with torch.no_grad():
        output = model(**PLAIN)
    assert accelerator.gather_for_metrics(output.logits).shape[:2] == (2, 37)


def padded_logits(**options: Any) -> Any:
    accelerator, model = prepared({**options, "gather_outputs": "loss_chunk_size" not in options})
    with torch.no_grad():
        return accelerator.pad_across_processes(tuple(x for x in (model(**PLAIN).get("logits"),) if x is not None))


def other_head(**options: Any) -> Any:
    import transformers

    model = transformers.LlamaForTokenClassification._from_config(tiny_model().config, attn_implementation="usp")
    return prepared(options, model=model)[1](**{**PLAIN, "labels": PLAIN["labels"].clamp(-100, 1)})


def loader(dispatch: bool | None) -> Any:
    from accelerate import Accelerator, DataLoaderConfiguration

    fresh_accelerate()
    settings = DataLoaderConfiguration(dispatch_batches=dispatch)
    config = hf_usp.UspParallelismConfig(cp_size=2)
    accelerator = Accelerator(cpu=True, parallelism_config=config, dataloader_config=settings)
    return list(accelerator.prepare(torch.utils.data.DataLoader(rows(4, 9), batch_size=None)))


def sizes(**given: int) -> Any:
    from accelerate import Accelerator

    fresh_accelerate()
    return Accelerator(cpu=True, parallelism_config=hf_usp.UspParallelismConfig(**given))


def axis(**name: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return hf_usp.UspMesh.from_device_mesh(init_device_mesh("cpu", (2,), mesh_dim_names=("sequence",)), **name)


def whole_tensor(dim: int) -> Any:
    mesh = hf_usp.UspMesh.build(ring_degree=2, ulysses_degree=1)
    layout = hf_usp.shard(without(PLAIN, "labels"), mesh)["usp"]
    full = hf_usp.unshard(torch.zeros(2, 3, layout.local_length), layout, dim=dim)
    assert full.shape == (2, 3, 37)


def attend(
    kernel: str | None = None,
    dtype: torch.dtype = torch.float32,
    extra: int = 0,
    of_queries: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
    layout: Any = None,
    **options: Any,
) -> Any:
    mesh = hf_usp.UspMesh.build(ring_degree=2, ulysses_degree=1)
    mine = hf_usp.shard(without(PLAIN, "labels"), mesh, kernel=kernel)["usp"]
    q = torch.randn(2, mine.local_length + extra, 4, 16)
    layout = mine if layout is None else layout
    return hf_usp.usp_attention(of_queries(q), q.to(dtype), q.to(dtype), layout, **options)


def sparse_and_dense(x: torch.Tensor) -> torch.Tensor:
    return x.to_sparse().to_dense()


def sharded(**changes: Any) -> Callable[[], Any]:
    return lambda: hf_usp.shard({**PLAIN, **changes}, hf_usp.UspMesh.build(ring_degree=2, ulysses_degree=1))


def wants_more(self_check: bool) -> Any:
    """A model that takes no batch as short as that of the self-check."""
    model = tiny_model()

    def fail(module: Any, args: tuple[torch.Tensor]) -> None:
        if args[0].shape[1] < 8:
            raise IndexError("too short")

    model.model.layers[0].mlp.register_forward_pre_hook(fail)
    return prepared({"self_check": self_check}, model=model)[1](**PLAIN)


def compiled(ours: bool) -> Any:
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
    model = tiny_model(**dynamic)
    return prepared(model=torch.compile(model, backend="eager") if ours else model)[1](**PLAIN)


def counted(count: Any) -> Any:
    mesh = hf_usp.UspMesh.build(ring_degree=2, ulysses_degree=1)
    return tiny_model()(**hf_usp.shard({**PLAIN, "num_items_in_batch": count}, mesh))


TWO_RANKS: dict[str, Case] = {
    "pack documents with position_ids that restart and no attention_mask": Case(
        call({**PLAIN, "attention_mask": ONES.index_fill(1, torch.tensor([9]), 0)}), exact(PACKED)
    ),
    "leave out attention_mask and pass position_ids that restart": Case(
        call({**PLAIN, "attention_mask": NUMBERS}), documents_apart
    ),
    "(attention_mask != 0).long()": Case(
        call({**PLAIN, "attention_mask": NUMBERS}),
        exact({**PLAIN, "labels": IGNORED, "attention_mask": (NUMBERS != 0).long()}),
    ),
    "leave out attention_mask for packed rows": Case(
        call({**PLAIN, "attention_mask": ONES, "cu_seq_lens_q": CU}), call({**PLAIN, "cu_seq_lens_q": CU})
    ),
    "pass position_ids that restart at each document": Case(call({**PLAIN, "cu_seq_lens_q": CU[1:]}), exact(PACKED)),
    "describe documents with position_ids that restart": Case(
        call({**PLAIN, "attention_mask": torch.ones(2, 1, 37, 37)}), exact(PACKED)
    ),
    "padding with a 2D attention_mask": Case(call({**PLAIN, "attention_mask": torch.ones(2, 1, 37, 37)}), exact(RIGHT)),
    "from the batch (Trainer: remove_unused_columns=True": Case(
        call({**PLAIN, "hint": torch.zeros(2, 3)}), exact(PLAIN)
    ),
    "set output_attentions=False": Case(
        call({**PLAIN, "output_attentions": True}), call({**PLAIN, "output_attentions": False})
    ),
    "set attention_dropout=0.0 in the model's config": Case(
        call(PLAIN, attention_dropout=0.1), exact(PLAIN, attention_dropout=0.0)
    ),
    "call hf_usp.shard_recurrent_layers(model) once before the loop": Case(
        manual_loop(PLAIN, family="qwen3_5_text", **HYBRID),
        manual_loop(PLAIN, hf_usp.shard_recurrent_layers, "qwen3_5_text", **HYBRID),
    ),
    "set output_router_logits=False": Case(
        manual_loop(PLAIN, family="mixtral", **EXPERTS),
        manual_loop(PLAIN, family="mixtral", **{**EXPERTS, "output_router_logits": False}),
    ),
    "UspParallelismConfig(...)).prepare(model) shard the batches": Case(
        manual_loop(PLAIN, family="mixtral", **EXPERTS), exact(PLAIN, family="mixtral", **EXPERTS)
    ),
    "attn_implementation={NAME!r}": Case(lambda: prepared(attention="sdpa"), exact(PLAIN)),
    "leave logits_to_keep out, or pass it without labels": Case(call({**PLAIN, "logits_to_keep": 3}), exact(PLAIN)),
    "leave logits_to_keep out and take some": Case(
        call({"input_ids": IDS, "logits_to_keep": ONES}), lambda: prepared()[1](IDS).logits[:, :3]
    ),
    "leave gather_outputs out": Case(lambda: loss_outside(False), lambda: loss_outside(None)),
    "UspParallelismConfig(self_check=False) switches the check off": Case(
        lambda: peeking({}), lambda: peeking({"self_check": False})
    ),
    "max_norm of an embedding": Case(lambda: normed(0.01), lambda: normed(None)),
    "leave neftune_noise_alpha out": Case(lambda: noisy(5.0), lambda: noisy(None)),
    "leave out create_graph": Case(lambda: second_derivative(True), lambda: second_derivative(False)),
    "UspParallelismConfig(gather_outputs=True) for predict": Case(metrics, lambda: metrics(gather_outputs=True)),
    "leave out loss_chunk_size for predict and compute_metrics": Case(
        lambda: padded_logits(loss_chunk_size=16), padded_logits
    ),
    "with its own loss, or leave out loss_chunk_size": Case(lambda: other_head(loss_chunk_size=16), other_head),
    "leave dispatch_batches out": Case(lambda: loader(True), lambda: loader(None)),
    "leave both data-parallel sizes out": Case(lambda: sizes(cp_size=2, dp_replicate_size=2), lambda: sizes(cp_size=2)),
    "name the context-parallel axis with cp_axis=...": Case(axis, lambda: axis(cp_axis="sequence")),
    "pass dim=..., the dim of the sequence": Case(lambda: whole_tensor(1), lambda: whole_tensor(2)),
    "leave kernel=None to let hf_usp choose": Case(lambda: attend("flash_attn"), lambda: attend(None)),
    "pass sliding_window=1 or more": Case(lambda: attend(sliding_window=0), lambda: attend(sliding_window=1)),
    "cast them, as in k.to(q.dtype)": Case(lambda: attend(dtype=torch.bfloat16), attend),
    "cast them, as in q.to(torch.bfloat16)": Case(
        lambda: attend(of_queries=torch.Tensor.long, dtype=torch.int64), lambda: attend(dtype=torch.float32)
    ),
    "as such a tensor (torch.as_tensor, x.to_dense())": Case(
        lambda: attend(of_queries=torch.Tensor.to_sparse), lambda: attend(of_queries=sparse_and_dense)
    ),
    'pass hf_usp.shard(batch, mesh)["usp"]': Case(lambda: attend(layout=PLAIN), attend),
    "with torch.tensor, or cast it (x.long(), x.to_dense())": Case(
        sharded(input_ids=IDS.float()), sharded(input_ids=IDS.float().long())
    ),
    "or a data collator that makes tensors": Case(
        sharded(labels=IDS.tolist()), sharded(labels=torch.as_tensor(IDS.tolist()))
    ),
    "_enable()": Case(lambda: offloaded(False), lambda: offloaded(True)),
    "shard inputs with hf_usp.shard": Case(lambda: attend(extra=3), attend),
    "for a module of your own use hf_usp.shard and hf_usp.usp_attention": Case(
        lambda: find_model(torch.nn.Linear(2, 2)), attend
    ),
    "UspParallelismConfig(self_check=False) goes without the check": Case(
        lambda: wants_more(True), lambda: wants_more(False)
    ),
    "leave out torch_compile": Case(lambda: compiled(True), lambda: compiled(False)),
    "pass it as an integer tensor": Case(
        lambda: counted(torch.tensor(9.0, dtype=torch.bfloat16)), lambda: counted(torch.tensor(9))
    ),
    "pass (labels[:, 1:] != -100).sum() of all batches": Case(
        lambda: counted(0), lambda: counted((PLAIN["labels"][:, 1:] != -100).sum())
    ),
    "or as a Python number": Case(lambda: counted(torch.tensor(9.0, dtype=torch.float16)), lambda: counted(9)),
    "set layerdrop": Case(
        call(PLAIN, family="opt", layerdrop=0.9, dropout=0.0, word_embed_proj_dim=32, ffn_dim=64),
        exact(PLAIN, family="opt", layerdrop=0.0, dropout=0.0, word_embed_proj_dim=32, ffn_dim=64),
    ),
    "leave out mlp_chunk_size": Case(
        call(PLAIN, {"mlp_chunk_size": 8}, family="mixtral"), exact(PLAIN, family="mixtral")
    ),
    "leave out head_groups, or choose at most": Case(
        call(PLAIN, {"layer_chunk_size": 8, "head_groups": 8}), exact(PLAIN, {"layer_chunk_size": 8, "head_groups": 4})
    ),
}


def follow(words: str) -> str:
    """The fault of a case, or nothing."""
    case = {**TWO_RANKS, **ONE_PROCESS}[words]
    said = words.replace("{NAME!r}", "'usp'")
    message = "nothing was refused"
    try:
        case.refused()
    except hf_usp.UspError as refusal:
        message = str(refusal)  # on a rank that found nothing itself, with that of another
    if dist.is_initialized():
        dist.barrier()
    if said not in message:
        return message
    try:
        difference = case.followed()
    except Exception:
        return traceback.format_exc()
    return f"off by {difference}" if isinstance(difference, float) and not difference < 1e-5 else ""


ONE_PROCESS: dict[str, Case] = {
    "leave it out: each rank generates alone": Case(
        lambda: hf_usp.UspParallelismConfig(cp_size=2, generate="shards"),
        lambda: hf_usp.UspParallelismConfig(cp_size=2),
    ),
    "leave sp_size at 1": Case(
        lambda: hf_usp.UspParallelismConfig(cp_size=2, sp_size=2),
        lambda: hf_usp.UspParallelismConfig(cp_size=2, sp_size=1),
    ),
    "choose one: loss_chunk_size for training": Case(
        lambda: hf_usp.UspParallelismConfig(cp_size=2, loss_chunk_size=8, gather_outputs=True),
        lambda: hf_usp.UspParallelismConfig(cp_size=2, loss_chunk_size=8),
    ),
    "leave out layer_chunk_size, or share sequences by cp_size=2": Case(
        lambda: hf_usp.UspParallelismConfig(cp_size=1, layer_chunk_size=8),
        lambda: [hf_usp.UspParallelismConfig(cp_size=n, layer_chunk_size=8 if n > 1 else None) for n in (1, 2)],
    ),
    "pass layer_chunk_size=4096, too, or leave out head_groups": Case(
        lambda: hf_usp.UspParallelismConfig(cp_size=2, head_groups=2),
        lambda: [
            hf_usp.UspParallelismConfig(cp_size=2),
            hf_usp.UspParallelismConfig(cp_size=2, layer_chunk_size=4096, head_groups=2),
        ],
    ),
    "pass layer_chunk_size=4096, too, or leave out keep_attention": Case(
        lambda: hf_usp.UspParallelismConfig(cp_size=2, keep_attention=True),
        lambda: [
            hf_usp.UspParallelismConfig(cp_size=2),
            hf_usp.UspParallelismConfig(cp_size=2, layer_chunk_size=4096, keep_attention=True),
        ],
    ),
    "pass memory='auto', or memory={'layer_chunk_size': 4096, 'head_groups': 4}": Case(
        lambda: hf_usp.UspParallelismConfig(cp_size=2, memory="most"),
        lambda: [
            hf_usp.UspParallelismConfig(cp_size=2, memory=memory)
            for memory in ("auto", {"layer_chunk_size": 4096, "head_groups": 4})
        ],
    ),
    "put the option into the dict, as in memory={'layer_chunk_size': 4096}, or leave out memory": Case(
        lambda: hf_usp.UspParallelismConfig(cp_size=2, memory={"loss_chunk_size": 8}, layer_chunk_size=4096),
        lambda: [
            hf_usp.UspParallelismConfig(cp_size=2, memory={"layer_chunk_size": 4096, "loss_chunk_size": 8}),
            hf_usp.UspParallelismConfig(cp_size=2, layer_chunk_size=4096, loss_chunk_size=8),
        ],
    ),
    "choose one: memory='auto' for training": Case(
        lambda: hf_usp.UspParallelismConfig(cp_size=2, memory="auto", gather_outputs=True),
        lambda: [
            hf_usp.UspParallelismConfig(cp_size=2, memory="auto"),
            hf_usp.UspParallelismConfig(cp_size=2, gather_outputs=True),
        ],
    ),
    "choose ulysses_degree from": Case(
        lambda: hf_usp.UspParallelismConfig(cp_size=8, ulysses_degree=3),
        lambda: [hf_usp.UspParallelismConfig(cp_size=8, ulysses_degree=u) for u in (1, 2, 4, 8)],
    ),
    "use sequence_order='auto'": Case(
        lambda: fixed_assignment(8, 2, "spiral"),
        lambda: hf_usp.UspParallelismConfig(cp_size=2, sequence_order="auto"),
    ),
    "set attention_chunk_size to 1 or more": Case(
        lambda: Documents.from_bounds([0, 8]).chunked(0, 0), lambda: Documents.from_bounds([0, 8]).chunked(1, 0)
    ),
    "set the config's sliding_window to 1 or more": Case(
        lambda: Mask(Documents.from_bounds([0, 8]), -2, 0), lambda: Mask(Documents.from_bounds([0, 8]), 0, 0)
    ),
    "without quotes": Case(
        lambda: hf_usp.UspParallelismConfig(cp_size="2"),  # type: ignore[arg-type]
        lambda: hf_usp.UspParallelismConfig(cp_size=2),
    ),
    "leave it out to let hf_usp choose": Case(
        lambda: hf_usp.UspParallelismConfig(cp_size=2, kernel="flash_atn"),
        lambda: hf_usp.UspParallelismConfig(cp_size=2),
    ),
    "call Documents.from_bounds with": Case(
        lambda: Documents(*(np.array(x) for x in ([0, 4], [0], [9]))), lambda: Documents.from_bounds([0, 4])
    ),
    "pass ulysses_degree=... yourself": Case(
        lambda: chosen(), lambda: hf_usp.UspParallelismConfig(cp_size=8, ulysses_degree=2)
    ),
    "pass profile_step=3": Case(
        lambda: UspMetricsCallback(torch.nn.Module(), trace="folder"),  # type: ignore[arg-type]
        lambda: UspMetricsCallback(a_trainer(), trace="folder", profile_step=3),
    ),
    "build them with DataCollatorWithFlattening": Case(
        lambda: find_documents(1, 8, None, None, torch.tensor([3, 8])),
        lambda: find_documents(1, 8, None, None, flattened()),
    ),
}


def a_trainer() -> Any:
    """As much of one as a report looks at."""
    settings, handler = SimpleNamespace(bf16=False, fp16=False), SimpleNamespace(callbacks=[])
    return SimpleNamespace(args=settings, accelerator=None, model=tiny_model(), callback_handler=handler)


def chosen() -> Any:
    """A degree for a model without heads."""
    from transformers import MambaConfig

    from hf_usp.planner import choose_degree

    return choose_degree(MambaConfig(), None, cp_size=8, tp_size=1, ranks=8, node=8, tokens=None)


def flattened() -> Any:
    from transformers import DataCollatorWithFlattening

    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    return collate([{"input_ids": [3] * n, "labels": [3] * n} for n in (5, 3)])["cu_seq_lens_q"]


@pytest.mark.parametrize("words", ONE_PROCESS)
def test_in_one_process(words: str) -> None:
    assert follow(words) == ""


@pytest.mark.parametrize("words", TWO_RANKS)
def test_on_two_ranks(two_ranks: Ranks, words: str) -> None:
    assert two_ranks.run(follow, words) == ["", ""]


# Words of remedies that other tests follow -> the file and the test.
ELSEWHERE: dict[str, tuple[str, str]] = {
    "set lora_dropout=0.0": (
        "models/test_indexed_layers.py",
        "test_dropout_of_an_adapter_inside_the_expansion_is_refused",
    ),
    "name kernel='blockwise'": ("kernels/test_registry.py", "test_eager_is_refused_beyond_a_size"),
    "restore_flash_attention_impl()": ("kernels/test_registry.py", "test_an_activation_that_torch_would_refuse"),
    "get_last_complete_checkpoint(folder)": (
        "callbacks/test_resume.py",
        "test_a_killed_run_leaves_the_last_complete_checkpoint",
    ),
    "call torch.distributed.init_process_group()": ("attention/test_attention.py", "def test_"),
    "set per_device_train_batch_size": ("distributed/test_failures.py", "auto_find_batch_size"),
    "leave out torch.compile": ("test_remedies.py", "compiled"),
    "leave out loss_chunk_size": ("test_remedies.py", "other_head"),
    "pass position_ids, or pad on the right": ("models/test_models.py", "right"),
    "pass cu_seq_lens_q as well": ("scripts/test_finetune.py", "gpt"),
    "describe documents with cu_seq_lens_q or position_ids": (
        "recurrent/test_recurrent.py",
        "test_packed_documents_start_from_nothing",
    ),
    "leave out layer_chunk_size": (
        "memory/test_tiled_layer.py",
        "test_a_model_without_layers_to_compute_in_chunks_is_refused",
    ),
    "pass keep_attention=True for all layers": ("memory/test_kept_attention.py", "test_more_layers_than_there_are"),
    "on a CPU name the file of hf-usp check as machine=": (
        "integrations/test_memory_choice.py",
        "test_another_length_gets_another_way",
    ),
    "fix the options by hand, as in memory={'mlp_chunk_size': 4096}": (
        "integrations/test_memory_choice.py",
        "test_a_dict_means_the_options",
    ),
    "tokens fit in a step; or share": ("integrations/test_memory_choice.py", "test_another_length_gets_another_way"),
    "or leave out offload_checkpoints": ("memory/test_kept_attention.py", "test_a_rank_without_the_memory_stops_all"),
    "call model.train() or model.eval() before the forward": (
        "memory/test_tiled_layer.py",
        "test_another_mode_in_the_backward_is_refused",
    ),
    "train it without UspParallelismConfig": ("models/test_models.py", "eager"),
    "load the weights in float32": ("models/test_tensor_parallel.py", "test_experts_dealt_to_ranks"),
    "choose a tp_size that divides": ("models/test_tensor_parallel.py", "test_tp_around_the_mesh"),
    "resize_token_embeddings(pad_to_multiple_of=": ("models/test_tensor_parallel.py", "tie"),
    "or leave out ResumeGuard": (
        "callbacks/test_resume_guard.py",
        "test_full_determinism_and_a_resume_that_is_watched",
    ),
    "use a larger cp_size instead": ("integrations/test_deepspeed.py", "test_the_trainer_follows_one_process"),
    'write "train_batch_size": "auto"': ("integrations/test_deepspeed.py", "auto"),
    "UspParallelismConfig(cp_size=...) says it all": (
        "integrations/test_deepspeed.py",
        "test_the_trainer_follows_one_process",
    ),
    "give every rank the same": ("integrations/test_process_groups.py", "def test_"),  # ranks that are the same
    "hand out full logits and hidden states with": ("models/test_unsharded.py", "test_losses_made_outside_are_exact"),
    "as a multiple of num_generations": ("integrations/test_completions.py", "test_every_prompt_is_sampled_once"),
    "leave generation_batch_size out": ("integrations/test_completions.py", "test_every_prompt_is_sampled_once"),
    "wrap the reward function in hf_usp.once": ("integrations/test_completions.py", "once_mends_it"),
    'give vllm_mode="server"': ("integrations/test_trl_vllm.py", "test_a_server_completes_each_prompt_once"),
    "pass a function that returns its result": ("integrations/test_completions.py", "once_by_hand"),
    "prepare a second Transformers model by itself": ("models/test_unsharded.py", "prepared_modules(twin"),
    "leave offload=True out of": ("memory/test_activation_offload.py", "offload=True"),
    "use generate='whole'": ("models/test_generation.py", "test_remedies_are_followed"),
    "call model.eval() before generate": ("models/test_generation.py", "test_remedies_are_followed"),
    "set num_beams to": ("models/test_generation.py", "test_remedies_are_followed"),
    "leave out use_cache, or the cache": ("models/test_generation.py", "test_remedies_are_followed"),
    "hf_usp.apply_context_parallel), or leave the cache out": (
        "models/test_generation.py",
        "test_remedies_are_followed",
    ),
    "tokenize with padding_side='left'": ("models/test_generation.py", "test_remedies_are_followed"),
    "read the stream with num_workers=1": ("integrations/test_data_loader.py", '"dataloader_num_workers": 1'),
}
OPTION = re.compile(r"\b[a-z_]+=|[a-z](?<!len)\(|\b(leave|set) (out )?[a-z]+_[a-z_]+|hf_usp\.")
# Remedies for the command line are followed in tests/tools and tests/scripts.
COMMANDS = {"tools", *(f"planner/{name}.py" for name in ("plot", "request", "search", "text", "hardware"))}
ROOT = Path(hf_usp.__file__).parent


def remedies() -> list[tuple[str, str]]:
    """Place and text, with the expressions of its f-strings, of every remedy of the library that names an option."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        inside = path.relative_to(ROOT)
        if COMMANDS & {inside.parts[0], inside.as_posix()}:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "remedy":
                text = ast.unparse(node.value)
                if OPTION.search(text):
                    found.append((f"{path.relative_to(ROOT)}:{node.value.lineno}", text))
    return found


@pytest.mark.parametrize(("place", "text"), remedies(), ids=lambda x: x[:40])
def test_every_remedy_that_names_an_option_is_followed(place: str, text: str) -> None:
    known = (*ONE_PROCESS, *TWO_RANKS, *ELSEWHERE)
    assert any(words in text for words in known), f"{place}: follow the remedy {text} in a case of this table"


@pytest.mark.parametrize("words", ELSEWHERE)
def test_the_other_tests_are_there(words: str) -> None:
    path, name = ELSEWHERE[words]
    assert name in (Path(__file__).parent / path).read_text(encoding="utf-8")
