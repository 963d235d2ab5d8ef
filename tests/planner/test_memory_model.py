"""Memory that the planner predicts, against the bytes that are alive in a step, counted operator by operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ..harness import fresh_accelerate, training_arguments
from ..integrations.cpu_accelerator import cpu_as_accelerator, fsdp2
from ..ranks import Ranks

# (vocabulary, layers, tokens of a rank, checkpointing, loss chunk, MLP chunk, accumulated)
CASES = [
    (256, 4, 256, False, None, None, True),
    (256, 4, 256, False, None, None, False),
    (256, 4, 256, True, None, None, False),
    (256, 4, 256, True, 64, None, True),
    (4096, 2, 256, False, None, None, False),
    (4096, 2, 256, False, 64, None, False),
    (4096, 2, 256, True, None, None, True),
    (4096, 2, 256, True, 64, None, False),
    (2048, 3, 64, False, None, None, False),
    (256, 4, 512, False, None, 128, False),
    (256, 2, 512, True, 64, 256, False),
    (256, 2, 1024, True, 64, 128, True),
    (256, 2, 256, False, 64, 32, False),
    (8192, 2, 1024, True, 128, 128, True),  # hidden states of a long share beside the logits of a chunk
]
ON_MESHES = [CASES[1], CASES[2], CASES[7], CASES[10]]
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
}


def measure(ulysses: int, ring: int, cases: list[tuple[Any, ...]], element: int = 4) -> list[tuple[float, str, float]]:
    """On one rank: (predicted bytes, the moment of their peak, counted bytes) of each case, weights left out."""
    import torch
    from counting import Peak
    from transformers import LlamaConfig, LlamaForCausalLM

    import hf_usp
    from hf_usp.integrations.transformers import apply_memory_options
    from hf_usp.planner.memory_model import memory
    from hf_usp.planner.request import shape_of
    from hf_usp.planner.workload import Degrees, TrainingStep

    mesh, found = hf_usp.UspMesh.build(ring_degree=ring, ulysses_degree=ulysses), []
    for vocabulary, layers, local, checkpointing, chunk, mlp_chunk_size, accumulate in cases:
        config = LlamaConfig(vocab_size=vocabulary, num_hidden_layers=layers, **SIZES)
        dtype = {4: torch.float32, 2: torch.bfloat16}[element]
        llama = LlamaForCausalLM._from_config(config, attn_implementation="usp", dtype=dtype).train()
        if checkpointing:
            llama.gradient_checkpointing_enable({"use_reentrant": False})
        apply_memory_options(llama, chunk, mlp_chunk_size, False)
        ids = torch.zeros(1, local * ulysses * ring, dtype=torch.long)

        def step(llama: Any = llama, ids: Any = ids) -> None:
            llama(**hf_usp.shard({"input_ids": ids, "labels": ids}, mesh), use_cache=False).loss.backward()

        if accumulate:
            step()
        there = sum(p.grad.untyped_storage().nbytes() for p in llama.parameters() if p.grad is not None)
        # Views of weights and gradients are nothing that the step makes.
        with Peak(x for p in llama.parameters() for x in (p, p.grad) if x is not None) as counted:
            step()
        job = TrainingStep(
            local * ulysses * ring,
            element=element,
            optimizer=0,
            checkpointing=checkpointing,
            shard_params=False,
            loss_chunk_size=chunk,
            mlp_chunk_size=mlp_chunk_size,
            gradients=element,
            accumulate=accumulate,
        )
        it = memory(shape_of(config), Degrees(ulysses, ring), job)
        found.append((it.total - it.weights, it.peak, counted.peak + there))
    return found


def measure_fsdp2(sizes: dict[str, int], cases: list[tuple[Any, ...]]) -> list[tuple[float, str, float]]:
    """As `measure`, with FSDP2: weights and the state of AdamW are counted, too."""
    import torch
    from counting import Peak
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_usp.planner.memory_model import memory
    from hf_usp.planner.request import shape_of
    from hf_usp.planner.workload import Degrees, TrainingStep

    found = []
    for vocabulary, layers, local, checkpointing, loss_chunk_size, mlp_chunk_size, accumulate in cases:
        config = LlamaConfig(vocab_size=vocabulary, num_hidden_layers=layers, **SIZES)
        with cpu_as_accelerator():
            llama = LlamaForCausalLM._from_config(config, attn_implementation="usp").train()
            if checkpointing:
                llama.gradient_checkpointing_enable({"use_reentrant": False})
            accelerator = fsdp2(llama, {**sizes, "loss_chunk_size": loss_chunk_size, "mlp_chunk_size": mlp_chunk_size})
            prepared, optimizer = accelerator.prepare(llama, torch.optim.AdamW(llama.parameters()))
            cp = sizes["cp_size"]
            ids = torch.zeros(1, local * cp, dtype=torch.long)

            def step(model: Any = prepared, ids: Any = ids, accelerator: Any = accelerator) -> None:
                accelerator.backward(model(input_ids=ids, labels=ids, use_cache=False).loss)

            step()
            optimizer.step()
            peaks = []
            for _ in range(2):  # the smaller: now and then garbage in cycles waits for its collector
                if not accumulate:
                    optimizer.zero_grad()
                lasting = [x for p in prepared.parameters() for x in (p, p.grad) if x is not None]
                lasting += [x for state in optimizer.state.values() for x in state.values() if x.ndim]
                with Peak(lasting) as counted:
                    step()
                peaks.append(counted.peak + counted.there)
        job = TrainingStep(
            local * cp,
            element=4,
            optimizer=8,
            checkpointing=checkpointing,
            loss_chunk_size=loss_chunk_size,
            mlp_chunk_size=mlp_chunk_size,
            gradients=4,
            accumulate=accumulate,
        )
        ulysses = sizes["ulysses_degree"]
        it = memory(shape_of(config), Degrees(ulysses, cp // ulysses, dp_shard=sizes.get("dp_shard_size", 1)), job)
        found.append((it.total, it.peak, min(peaks)))
    return found


def measure_tp(path: str, case: tuple[Any, ...]) -> tuple[float, str, float]:
    """As `measure_fsdp2`, with Transformers' tensor parallelism 2, FSDP over the 2 ranks of a ring, and the Trainer."""
    import warnings

    from counting import Peak
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
    from transformers.distributed import DistributedConfig

    import hf_usp
    from hf_usp.compat import local_part
    from hf_usp.planner.memory_model import memory
    from hf_usp.planner.request import shape_of
    from hf_usp.planner.workload import Degrees, TrainingStep

    fresh_accelerate()
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    _, _, local, checkpointing, loss_chunk_size, mlp_chunk_size, _ = case
    chunks = {"loss_chunk_size": loss_chunk_size, "mlp_chunk_size": mlp_chunk_size}
    args = training_arguments(
        path,
        save_strategy="no",
        max_steps=2,
        per_device_train_batch_size=1,
        optim="adamw_torch",
        max_grad_norm=0.0,
        gradient_checkpointing=checkpointing,
        parallelism_config=hf_usp.UspParallelismConfig(cp_size=2, ulysses_degree=1, **chunks),
    )
    sharding = DistributedConfig(tp_size=2, fsdp_size=2)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="usp", distributed_config=sharding)

    class Watch(TrainerCallback):
        """The forward and backward of the second step: then AdamW has its state."""

        def __init__(self) -> None:
            self.counted: Any = None
            self.lasting = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                optimizer = kwargs["optimizer"].optimizer
                lasting = [local_part(p) for p in model.parameters()]
                lasting += [local_part(x) for its in optimizer.state.values() for x in its.values() if x.ndim]
                # Weights are views of the file they were loaded from: what is theirs counts, not their storage.
                self.lasting = sum(x.nbytes for x in lasting)
                self.counted = Peak(lasting)
                self.counted.__enter__()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.counted is not None:
                self.counted.__exit__(None, None, None)

    row = [0] * (2 * local)
    watch = Watch()
    Trainer(model=model, args=args, train_dataset=[{"input_ids": row, "labels": row}] * 4, callbacks=[watch]).train()
    job = TrainingStep(
        2 * local, element=4, optimizer=8, checkpointing=checkpointing, gradients=4, accumulate=False, **chunks
    )
    it = memory(shape_of(model.config), Degrees(1, 2, tp=2), job)
    return it.total, it.peak, watch.counted.peak + watch.lasting


def compare(results: list[tuple[float, str, float]]) -> None:
    ratios = [predicted / counted for predicted, _, counted in results]
    assert all(0.9 < ratio < 1.1 for ratio in ratios), [(round(x / y, 3), peak) for x, peak, y in results]


# Three lengths, with everything that saves memory and with nothing; in bf16 and fp32.
LENGTHS = [
    (256, 3, local, saving, 64, 64 if saving else None, False) for local in (128, 256, 512) for saving in (True, False)
]


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing")
@pytest.mark.parametrize("element", [4, 2])
def test_memory_is_that_of_a_measured_step(element: int) -> None:
    """Within 10 %, with gradients of earlier steps and without, checkpointed or not, logits whole or in chunks."""
    results = measure(1, 1, [*CASES, *LENGTHS] if element == 4 else LENGTHS, element)
    compare(results)
    moments = {moment.split(", ")[-1] for _, moment, _ in results}
    assert moments >= ({"loss", "MLP", "gradients"} if element == 4 else {"loss", "MLP", "final norm"})


def test_memory_of_two_ranks_is_that_of_a_measured_step(two_ranks: Ranks) -> None:
    for ulysses, ring in ((2, 1), (1, 2)):
        for element in (4, 2):
            for results in two_ranks.run(measure, ulysses, ring, LENGTHS, element):
                compare(results)


@pytest.mark.parametrize("element", [4, 2])
@pytest.mark.parametrize(("ulysses", "ring"), [(4, 1), (2, 2), (1, 4)])
def test_memory_of_a_rank_is_that_of_a_measured_step(four_ranks: Ranks, ulysses: int, ring: int, element: int) -> None:
    for results in four_ranks.run(measure, ulysses, ring, [*ON_MESHES, *LENGTHS] if element == 4 else LENGTHS, element):
        compare(results)


UNDER_FSDP2 = [
    CASES[1],
    (4096, 2, 64, True, None, None, False),
    (256, 8, 16, False, None, None, True),
    (256, 2, 16, False, None, None, False),  # mostly layers that are gathered, and gradients that go
]


def test_memory_under_fsdp2_is_that_of_a_measured_step(four_ranks: Ranks) -> None:
    """Weights, gradients and AdamW's state spread over dp_shard x cp = 4 ranks, layers gathered one by one."""
    sizes = {"cp_size": 2, "ulysses_degree": 1, "dp_shard_size": 2}
    for results in four_ranks.run(measure_fsdp2, sizes, UNDER_FSDP2):
        compare(results)


UNDER_TP = [
    CASES[1],
    (4096, 2, 256, True, None, None, False),  # whole logits, on every rank
    (4096, 2, 256, True, 64, None, False),
    (256, 8, 16, False, None, None, False),
]


@pytest.mark.parametrize("case", UNDER_TP, ids=str)
def test_memory_under_tensor_parallelism_is_that_of_a_measured_step(
    four_ranks: Ranks, tmp_path: Path, case: tuple[Any, ...]
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    path = str(tmp_path / "model")
    LlamaForCausalLM(LlamaConfig(vocab_size=case[0], num_hidden_layers=case[1], **SIZES)).save_pretrained(path)
    compare(four_ranks.run(measure_tp, path, case))
