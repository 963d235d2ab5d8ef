"""torch.compile: a decoder layer is one graph, the same for every batch, with the numbers of the uncompiled layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hf_usp
from hf_usp.kernels.cpu_flash import CpuFlashKernel
from hf_usp.memory.activation_checkpointing import selective_checkpoint_contexts

from ..harness import checkpointing, compare, fresh_accelerate, training_arguments
from ..ranks import Ranks
from ..tiny import batch_of, rows, tiny_model


def compiled(model: Any, backend: str = "aot_eager") -> Any:
    """The layers of a model compiled without graph breaks; the result counts compiled frames."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    for layer in model.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    return counter


def step(model: Any, mesh: hf_usp.UspMesh, kind: str, length: int = 38) -> list[torch.Tensor]:
    """Loss and gradients of this rank's share."""
    model.zero_grad()
    out = model(**hf_usp.shard(batch_of(kind, length=length), mesh), use_cache=False)
    out.loss.backward()
    return [out.loss.detach(), *(p.grad.clone() for p in model.parameters())]


def difference(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(mine, theirs, strict=True))


def layers_as_graphs(family: str, degrees: tuple[int, int]) -> None:
    mesh = hf_usp.UspMesh.build(ring_degree=degrees[0], ulysses_degree=degrees[1])
    changes = {"head_dim": 16} if family != "qwen2" else {}
    plain, model = (tiny_model(family, **changes).train() for _ in range(2))
    frames = compiled(model)
    assert difference(step(model, mesh, "plain"), step(plain, mesh, "plain")) < 1e-6
    first = frames.frame_count
    assert 0 < first <= len(model.model.layers)
    for kind in ("packed", "right", "left", "packed"):
        # Other documents, other padding, other layouts: the same graphs.
        assert difference(step(model, mesh, kind), step(plain, mesh, kind)) < 1e-6
    assert frames.frame_count == first
    for length in (60, 80, 50) if family == "qwen2" else ():
        # Another length is compiled once more, for all lengths.
        assert difference(step(model, mesh, "packed", length), step(plain, mesh, "packed", length)) < 1e-6
    assert frames.frame_count <= 2 * first


@pytest.mark.timeout(600)
@pytest.mark.parametrize("family, degrees", [("qwen2", (1, 2)), ("gpt_oss", (2, 1)), ("gemma2", (2, 1))], ids=str)
def test_a_decoder_layer_is_one_graph(two_ranks: Ranks, family: str, degrees: tuple[int, int]) -> None:
    """Windows, sinks and softcaps included."""
    two_ranks.run(layers_as_graphs, family, degrees, timeout=400)


def two_under_way() -> None:
    """Two forwards, then their backwards; the second batch has other documents. Two models, on two meshes."""
    meshes = [hf_usp.UspMesh.build(ring_degree=r, ulysses_degree=u) for r, u in ((2, 1), (1, 2))]
    models = [tiny_model("llama").train() for _ in meshes]
    plain = tiny_model("llama").train()
    compiled(models[0])
    compiled(models[1])
    kinds = ("plain", "packed")
    losses = [
        [model(**hf_usp.shard(batch_of(kind, length=38), mesh), use_cache=False).loss for kind in kinds]
        for model, mesh in zip(models, meshes, strict=True)
    ]
    for pair in losses:
        for loss in pair:
            loss.backward()
    for model, mesh in zip(models, meshes, strict=True):
        each = [step(plain, mesh, kind)[1:] for kind in kinds]
        expected = [a + b for a, b in zip(*each, strict=True)]
        assert difference([p.grad for p in model.parameters()], expected) < 1e-6


@pytest.mark.timeout(600)
def test_every_backward_finds_the_layout_of_its_forward(two_ranks: Ranks) -> None:
    two_ranks.run(two_under_way, timeout=400)


# torch 2.13 looks at the gradients of a compiled region's inputs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_layer_keeps_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the policy its recomputation does not attend again; plain checkpointing attends twice."""
    mesh, calls = hf_usp.UspMesh.build(ring_degree=1, ulysses_degree=1), []
    stock = CpuFlashKernel.forward
    monkeypatch.setattr(CpuFlashKernel, "forward", lambda *args: calls.append(1) or stock(*args))
    expected = step(tiny_model("llama").train(), mesh, "plain")
    for context, attended in (({}, 4), ({"context_fn": selective_checkpoint_contexts}, 2)):
        model = tiny_model("llama").train()
        checkpointing(model, {"use_reentrant": False, **context})
        compiled(model)
        calls.clear()
        assert difference(step(model, mesh, "plain"), expected) < 1e-6
        assert len(calls) == attended


def train(
    folder: str, cp_size: int, options: dict[str, Any], regional: bool = False, chunk: int | None = None
) -> dict[str, Any]:
    """Three steps of the stock Trainer and an evaluation."""
    from transformers import Trainer

    fresh_accelerate()
    torch._dynamo.reset()
    chunks = {"loss_chunk_size": chunk, "mlp_chunk_size": chunk}
    config = hf_usp.UspParallelismConfig(cp_size=cp_size, ulysses_degree=2, **chunks) if cp_size > 1 else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", str(regional).lower())
        args = training_arguments(
            folder,
            max_steps=3,
            learning_rate=0.05,
            optim="sgd",
            per_device_train_batch_size=2,
            logging_steps=1,
            save_strategy="no",
            parallelism_config=config,
            **options,
        )
        model = tiny_model("qwen2", "usp" if config else "eager")
        trainer = Trainer(model=model, args=args, train_dataset=rows(6, 40), eval_dataset=rows(3, 40))
        trainer.train()
        evaluation = trainer.evaluate()["eval_loss"]
    return {
        "losses": [h["loss"] for h in trainer.state.log_history if "loss" in h] + [evaluation],
        "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
        "counts": trainer.state.global_step,
    }


COMPILE = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_the_stock_trainer(two_ranks: Ranks, tmp_path: Path, regional: bool) -> None:
    """`torch_compile=True`: the model's own frames break into several graphs, its layers do not; the same weights.

    Layers compiled one by one, with loss and MLPs in chunks, which stay outside of graphs.
    """
    reference = train(str(tmp_path), 1, {})
    chunk = 7 if regional else None
    for mine in two_ranks.run(train, str(tmp_path), 2, COMPILE, regional, chunk, timeout=400):
        compare(mine, reference)


def test_a_copied_handle_is_refused() -> None:
    """The tensor that carries the layout must arrive itself: a copy has no layout."""
    mesh = hf_usp.UspMesh.build(ring_degree=1, ulysses_degree=1)
    handle = hf_usp.shard(batch_of("plain"), mesh)["attention_mask"].handle
    q = torch.randn(2, 37, 4, 16)
    arguments = ([-1, 0, 0, 0], 0.25, None, [1, 0])
    torch.ops.hf_usp.usp_flash_attn(q, q, q, None, handle, *arguments)
    with pytest.raises(hf_usp.UspModelError, match="was copied"):
        torch.ops.hf_usp.usp_flash_attn(q, q, q, None, handle.clone(), *arguments)


def test_without_a_mesh_a_layer_is_one_graph() -> None:
    """In one process "usp" is sdpa, also for torch.compile."""
    model = tiny_model("llama", "usp").train()
    ids = batch_of("plain")["input_ids"]
    expected = model(input_ids=ids, use_cache=False).logits
    torch._dynamo.reset()
    graph = torch.compile(model.model.layers[0], backend="eager", fullgraph=True)
    hidden = torch.randn(2, 37, 32)
    positions = model.model.rotary_emb(hidden, torch.arange(37)[None])
    keywords = {"attention_mask": None, "position_embeddings": positions}
    assert torch.equal(graph(hidden, **keywords), model.model.layers[0](hidden, **keywords))
    assert expected.shape == (2, 37, 64)
