"""Recurrent layers (gated delta rule, Mamba, short convolutions) on a sharded sequence.

`tests/models` compares every such architecture on plain and padded batches; here are packed documents, few heads, low
precision, checkpointing, and what is left behind.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

import hf_usp

from ..models.census import LENGTH, batch_of, tiny_model
from ..models.verdict import Step, attach_to
from ..ranks import Ranks

MESHES = [(2, 2), (4, 1), (1, 4)]
LENGTHS = (9, 2, 18)


def document_steps(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and logits of packed rows, computed one document at a time in one process; gradients stay in the model."""
    items, logits = 0, []
    losses = []
    for row in range(2):
        start = 0
        for size in LENGTHS:
            part = slice(start, start + size)
            ids, labels = batch["input_ids"][row : row + 1, part], batch["labels"][row : row + 1, part]
            out = model(input_ids=ids, position_ids=torch.arange(size)[None], use_cache=False)
            logits.append(out.logits[0])
            losses.append(torch.nn.functional.cross_entropy(out.logits[0, :-1].float(), labels[0, 1:], reduction="sum"))
            items += int((labels[0, 1:] != -100).sum())
            start += size
    loss = torch.stack(losses).sum() / items
    loss.backward()
    return loss.detach(), torch.cat(logits).detach()


@contextmanager
def passing_states(way: bool | None) -> Iterator[None]:
    """Scans pass states, or exchange heads, or what costs less (None)."""
    from hf_usp.models import recurrent_layers as recurrent

    stock = recurrent.states_pay
    if way is not None:
        recurrent.states_pay = lambda *args: way
    try:
        yield
    finally:
        recurrent.states_pay = stock


def packed_error(
    subject: str, mesh: tuple[int, int], changes: dict[str, Any], states: bool | None = None
) -> tuple[float, int]:
    """Largest relative error of packed rows whose documents are told by cu_seq_lens; recurrent layers found."""
    with passing_states(states):
        return _packed_error(subject, mesh, changes)


def _packed_error(subject: str, mesh: tuple[int, int], changes: dict[str, Any]) -> tuple[float, int]:
    reference, model = tiny_model(subject, "eager", **changes).train(), tiny_model(subject, "usp", **changes).train()
    batch = batch_of("packed")
    edges = torch.tensor([0, *torch.tensor(LENGTHS * 2).cumsum(0).tolist()])
    # No label of a document is predicted from the document before it.
    for edge in edges[:-1].tolist():
        batch["labels"][edge // LENGTH, edge % LENGTH] = -100
    loss, logits = document_steps(reference, batch)
    hooks = attach_to(model, mesh, True)
    out = model(**batch, cu_seq_lens_q=edges)
    out.loss.backward()
    got, expected = step_of(out.loss, out.logits.flatten(0, 1), model), step_of(loss, logits, reference)
    got.average_gradients()
    return expected.largest_error(got), len(hooks.recurrent.layers)


def step_of(loss: torch.Tensor, logits: torch.Tensor, model: Any) -> Step:
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return Step(loss.detach(), logits.detach(), gradients)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("subject", ["qwen3_next", "kimi_linear", "bamba", "jamba", "lfm2"])
def test_packed_documents_start_from_nothing(four_ranks: Ranks, subject: str, mesh: tuple[int, int]) -> None:
    for error, layers in four_ranks.run(packed_error, subject, mesh, {}):
        assert error < 1e-4 and layers > 0


def short_error(subject: str, length: int) -> tuple[float, int]:
    """Largest relative error of rows of so few tokens on 2 x 2 ranks; tokens of a rank."""
    reference, model = tiny_model(subject, "eager").train(), tiny_model(subject, "usp").train()
    ids = torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(0))
    expected = reference(ids, labels=ids, use_cache=False)
    hooks = attach_to(model, (2, 2), True)
    got = model(ids, labels=ids)
    for out in (expected, got):
        out.loss.backward()
    mine = step_of(got.loss, got.logits, model)
    mine.average_gradients()
    share = hf_usp.shard({"input_ids": ids}, hooks.mesh)["input_ids"]
    return step_of(expected.loss, expected.logits.detach(), reference).largest_error(mine), share.shape[1]


@pytest.mark.parametrize("subject", ["mamba2", "qwen3_next"])
def test_rows_shorter_than_two_tokens_a_rank(four_ranks: Ranks, subject: str) -> None:
    """A share of one token would pass for a step of generation, in which recurrent layers see no mask."""
    for length in (2, 4):
        for error, tokens in four_ranks.run(short_error, subject, length):
            assert error < 1e-4
            assert tokens == 2


@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("heads", [(1, 1), (1, 3), (3, 3), (2, 6)], ids=str)
def test_any_number_of_heads(four_ranks: Ranks, heads: tuple[int, int], states: bool) -> None:
    """Fewer heads than ranks, and numbers that no split divides."""
    changes = {"linear_num_key_heads": heads[0], "linear_num_value_heads": heads[1]}
    for error, _ in four_ranks.run(packed_error, "qwen3_next", (2, 2), changes, states):
        assert error < 1e-4


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("subject", ["qwen3_next", "kimi_linear"])
def test_packed_documents_pass_states(four_ranks: Ranks, subject: str, mesh: tuple[int, int]) -> None:
    for error, _ in four_ranks.run(packed_error, subject, mesh, {}, True):
        assert error < 1e-4


def padded_error(form: str) -> float:
    """Relative error of logits and gradients when states pass, against heads for tokens."""
    steps = []
    for way in (True, False):
        with passing_states(way):
            model = tiny_model("qwen3_5_text", "usp").train()
            attach_to(model, (2, 2), True)
            out = model(**batch_of(form))
            out.loss.backward()
            steps.append(step_of(out.loss, out.logits, model))
            steps[-1].average_gradients()
    return steps[0].largest_error(steps[1])


@pytest.mark.parametrize("form", ["plain", "left", "right"])
def test_both_ways_are_the_same(four_ranks: Ranks, form: str) -> None:
    assert max(four_ranks.run(padded_error, form)) < 1e-4


def sabotaged(what: str) -> str:
    """The self-check's verdict on a model whose exchange is broken in one way."""
    from hf_usp import UspError
    from hf_usp.recurrent import scan

    model = tiny_model("qwen3_next", "usp").eval()
    hooks = attach_to(model, (2, 2), True)
    stock = scan.scan_device_schedule, scan.halo_device_schedule
    try:
        if what == "order":  # results go home one token late
            scan.scan_device_schedule = lambda *a: (stock[0](*a)[0], stock[0](*a)[1].roll(1))
        if what == "halo":
            scan.halo_device_schedule = lambda layout, reach, device: stock[1](layout, reach - 1, device)
        if what == "layout":
            hooks.recurrent.release()
        model(**batch_of("plain"))
    except UspError as refusal:
        return str(refusal)
    finally:
        scan.scan_device_schedule, scan.halo_device_schedule = stock
    return ""


@pytest.mark.parametrize("what", ["order", "halo", "layout"])
def test_a_broken_exchange_is_refused(four_ranks: Ranks, what: str) -> None:
    verdicts = four_ranks.run(sabotaged, what)
    assert all(verdicts) and any("linear_attn" in verdict for verdict in verdicts)
    assert four_ranks.run(sabotaged, "nothing") == [""] * 4


def checkpointed_error(subject: str, reentrant: bool) -> float:
    """Recomputed layers find the batch they belong to, also when another one was seen in between."""
    model = tiny_model(subject, "usp").train()
    attach_to(model, (2, 2), True)
    model.enable_input_require_grads()  # what reentrant checkpointing wants
    model(**batch_of("plain")).loss.backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    out = model(**batch_of("plain"))
    model.eval()
    with torch.no_grad():
        model(**batch_of("plain"), cu_seq_lens_q=torch.tensor([0, 5, 2 * LENGTH]))
        model.generate(batch_of("plain")["input_ids"], max_new_tokens=2, do_sample=False, pad_token_id=0)
    model.train()
    out.loss.backward()
    got = [p.grad for p in model.parameters() if p.grad is not None]
    return max(((a - b).norm() / b.norm().clamp_min(1e-6)).item() for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("subject", ["qwen3_next", "mamba2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(four_ranks: Ranks, subject: str, reentrant: bool) -> None:
    assert max(four_ranks.run(checkpointed_error, subject, reentrant)) < 1e-5


def low_precision_error() -> tuple[float, float]:
    """Relative error of bf16 logits, sharded and in one process, against fp32 in one process."""
    batch = batch_of("plain")
    with torch.no_grad():
        exact = tiny_model("qwen3_next", "eager").eval()(**batch).logits
        alone = tiny_model("qwen3_next", "eager").to(torch.bfloat16).eval()(**batch).logits
        model = tiny_model("qwen3_next", "usp").to(torch.bfloat16).eval()
        attach_to(model, (2, 2), True)
        sharded = model(**batch).logits
    return ((sharded - exact).norm() / exact.norm()).item(), ((alone - exact).norm() / exact.norm()).item()


def test_bf16_is_as_exact_as_one_process(four_ranks: Ranks) -> None:
    for sharded, alone in four_ranks.run(low_precision_error):
        assert sharded < 1.2 * alone


def deaf_to_states() -> tuple[bool, bool]:
    """Findings of the self-check where a kernel ignores the state it is given, and whether the batch was right."""
    from transformers.models.qwen3_next import modeling_qwen3_next as modeling

    stock = modeling.torch_chunk_gated_delta_rule
    changes = {"linear_num_key_heads": 1, "linear_num_value_heads": 1}  # states would pay
    expected = tiny_model("qwen3_next", "eager", **changes).eval()(**batch_of("right")).loss
    model = tiny_model("qwen3_next", "usp", **changes).eval()

    def deaf(*args: Any, initial_state: Any = None, **kwargs: Any) -> Any:
        return stock(*args, **kwargs)

    try:
        modeling.torch_chunk_gated_delta_rule = deaf
        hooks = attach_to(model, (2, 2), True)
    finally:
        modeling.torch_chunk_gated_delta_rule = stock
    loss = model(**batch_of("right")).loss
    return hooks.traits.measured.continues_from_states, bool((loss - expected).abs() < 1e-5)


def test_a_kernel_that_ignores_states_gets_heads(four_ranks: Ranks) -> None:
    for continues, right in four_ranks.run(deaf_to_states):
        assert not continues and right


def left_behind() -> list[bool]:
    """A copy works by itself, `generate` runs whole, and a released model is what it was."""
    model = tiny_model("qwen3_next", "usp").eval()
    plain = tiny_model("qwen3_next", "usp").eval()
    ids = batch_of("plain")["input_ids"][:, :8]
    hooks = attach_to(model, (2, 2), True)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        loss, twins = model(**batch_of("plain")).loss, twin(**batch_of("plain")).loss
        tokens = [m.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (model, plain)]
    hooks.remove()
    named = [name for name, module in model.named_modules() if "forward" in module.__dict__]
    return [torch.equal(loss, twins), torch.equal(*tokens), named == []]


def test_copies_generation_and_release(four_ranks: Ranks) -> None:
    assert four_ranks.run(left_behind) == [[True] * 3] * 4


def manual_loop() -> tuple[str, float]:
    """The message to a loop over `shard`, and its error once it has followed."""

    reference, model = tiny_model("qwen3_next", "eager").train(), tiny_model("qwen3_next", "usp").train()
    share = hf_usp.shard(batch_of("right"), hf_usp.UspMesh.build(ring_degree=2, ulysses_degree=2))
    try:
        model(**share, use_cache=False)
        refusal = ""
    except hf_usp.UspError as error:
        refusal = str(error)
    dist.barrier()
    hf_usp.shard_recurrent_layers(model)
    out = model(**share, use_cache=False)
    out.loss.backward()
    whole = reference(**batch_of("right"), use_cache=False)
    whole.loss.backward()
    loss = out.loss.detach().clone()
    dist.all_reduce(loss)
    seen = batch_of("right")["attention_mask"].bool()
    logits = hf_usp.unshard(out.logits.detach(), share["usp"])
    got = step_of(loss / 4, logits[seen], model)
    got.average_gradients()
    return refusal, step_of(whole.loss, whole.logits[seen], reference).largest_error(got)


def test_a_hand_written_loop_prepares_such_layers_once(four_ranks: Ranks) -> None:
    for refusal, error in four_ranks.run(manual_loop):
        assert "linear_attention" in refusal and "shard_recurrent_layers" in refusal
        assert error < 1e-4


@pytest.mark.parametrize("subject", ["minimax", "zaya", "recurrent_gemma"])
def test_recurrences_in_a_layers_own_code_are_refused_there(subject: str) -> None:
    with pytest.raises(hf_usp.UspModelError, match="0 of them"):
        hf_usp.shard_recurrent_layers(tiny_model(subject, "usp"))


@pytest.mark.parametrize("subject", ["llama", "bamba", "falcon_h1", "jamba", "mamba2", "nemotron_h", "zamba2", "lfm3"])
def test_all_recurrent_layers_are_found(subject: str) -> None:
    hf_usp.shard_recurrent_layers(tiny_model(subject, "usp"))
