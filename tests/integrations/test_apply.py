"""Context parallelism applied to a model by hand, described, and removed again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import hf_usp

from ..ranks import Ranks
from ..tiny import HYBRID, batch_of, largest_difference, rows, tiny_model
from .what_we_change import PAGE, render

FAMILIES = {"llama": {}, "qwen3_5_text": HYBRID}


def test_the_page_is_written_from_the_tables() -> None:
    assert PAGE.read_text(encoding="utf-8") == render()


def loop_by_hand(family: str, kind: str) -> dict[str, Any]:
    """One step over full batches; the average of gradients over ranks is what DDP would compute."""
    model = tiny_model(family, **FAMILIES[family])
    mesh = hf_usp.UspMesh.build(ring_degree=2, ulysses_degree=2)
    assert hf_usp.apply_context_parallel(model, mesh, gather_outputs=True) is model
    batch = batch_of(kind)
    output = model(**batch)
    output.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for grad in grads.values():
        dist.all_reduce(grad)
        grad /= dist.get_world_size()
    said = hf_usp.describe(model)
    hf_usp.remove_context_parallel(model)
    with torch.no_grad():
        after = model(**batch).loss
    return {
        "loss": output.loss.item(),
        "logits": output.logits.detach(),
        "grads": grads,
        "after": after.item(),
        "described": said,
        "plain": hf_usp.describe(model),
    }


@pytest.mark.parametrize(("family", "kind"), [("llama", "left"), ("qwen3_5_text", "right")])
def test_a_loop_by_hand_passes_full_batches(four_ranks: Ranks, family: str, kind: str) -> None:
    reference, batch = tiny_model(family, "eager", **FAMILIES[family]), batch_of(kind)
    output = reference(**batch)
    output.loss.backward()
    grads = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    real = batch["attention_mask"].bool()
    for mine in four_ranks.run(loop_by_hand, family, kind):
        assert mine["loss"] == pytest.approx(output.loss.item(), abs=1e-5)
        assert mine["after"] == pytest.approx(output.loss.item(), abs=1e-5)
        torch.testing.assert_close(mine["logits"][real], output.logits[real].detach(), atol=1e-5, rtol=1e-4)
        assert largest_difference(mine["grads"], grads) < 1e-6
        assert "mesh: ring 2 x ulysses 2" in mine["described"] and "`pre_forward`" in mine["described"]
        assert ("recurrent layers: `forward`" in mine["described"]) == (family == "qwen3_5_text")
        assert mine["plain"].endswith("changed by hf_usp:\n  nothing")


def picture(model: Any, accelerator: Any, *others: Any) -> dict[str, Any]:
    """Identities of all attributes; hooks in their order; values of parameters."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute == "_buffers":
                value = {name: None if x is None else x.tolist() for name, x in value.items()}
            elif attribute.endswith("_hooks") or attribute in ("_parameters", "_modules"):
                value = [id(x) for x in (value.values() if isinstance(value, dict) else value)]
            elif attribute == "_gradient_checkpointing_func":
                value = (id(value), repr(value.keywords.get("context_fn")))
            elif not isinstance(value, bool | int | float | str | tuple):
                value = id(value)
            seen[f"{name}.{attribute}"] = value
    for i, other in enumerate((accelerator, *others)):
        seen |= {f"{i}.{attribute}": id(value) for attribute, value in vars(other).items()}
    return seen


def applied_and_removed(family: str) -> list[str]:
    """Differences after everything was applied, used and removed."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from torch.utils.data import DataLoader
    from transformers import default_data_collator

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    config = hf_usp.UspParallelismConfig(cp_size=2, loss_chunk_size=16, mlp_chunk_size=16, offload_checkpoints=True)
    model = tiny_model(family, **FAMILIES[family]).train()
    model.gradient_checkpointing_enable(hf_usp.save_attention_outputs())
    plain = tiny_model(family, **FAMILIES[family])
    loader: DataLoader[Any] = DataLoader(rows(4, 21), batch_size=2, shuffle=True, collate_fn=default_data_collator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    accelerator = Accelerator(cpu=True)
    before = picture(model, accelerator, loader)
    fresh = vars(accelerator).keys()

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, parallelism_config=config)
    changed = {name for name in hf_usp.integrations.accelerate.ACCELERATOR_CHANGES if name in vars(accelerator)}
    assert {"prepare", "gather", "state"} <= changed
    wrapped, optimizer, prepared, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    for batch in prepared:
        accelerator.backward(wrapped(**batch).loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    problems = []
    if "nothing" in hf_usp.describe(model):
        problems.append("nothing was applied")
    hf_usp.remove_context_parallel(accelerator)
    hf_usp.remove_context_parallel(model)
    if "nothing" not in hf_usp.describe(model):
        problems.append(hf_usp.describe(model))
    after = picture(model, accelerator, loader)
    own = {name for name in vars(accelerator) if name not in fresh}
    problems += [f"accelerator.{name} is new" for name in own & changed]
    problems += [f"accelerator.{name}" for name in changed if "hf_usp" in type(getattr(accelerator, name)).__module__]
    problems += [name for name in after if not name.startswith("0.") and after[name] != before.get(name)]
    problems += [f"{name} is gone" for name in before if name not in after and not name.startswith("0.")]
    problems += [f"scheduler.{name}" for name in vars(schedule) if name == "step"]
    batch = batch_of("plain")
    with torch.no_grad():
        if not torch.equal(model.eval()(**batch).logits, plain.eval()(**batch).logits):
            problems.append("logits")
    return problems


@pytest.mark.parametrize("family", FAMILIES)
def test_removing_restores_model_accelerator_and_loaders(two_ranks: Ranks, family: str) -> None:
    for problems in two_ranks.run(applied_and_removed, family):
        assert problems == []


def with_and_without_verdict(family: str, kind: str, changes: dict[str, Any]) -> list[Any]:
    """Loss, logits and gradients of a prepared model, or its refusal, with self_check=True and False."""
    found: list[Any] = []
    for check in (True, False):
        model = tiny_model(family, **changes)
        mesh = hf_usp.UspMesh.build(ring_degree=2, ulysses_degree=1)
        hf_usp.apply_context_parallel(model, mesh, self_check=check, gather_outputs=True)
        try:
            output = model(**batch_of(kind))
        except hf_usp.UspError as error:
            found.append(str(error))
            continue
        output.loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([output.loss.detach(), output.logits.detach(), *grads])
    return found


SWITCHED = {
    "llama, left padding": ("llama", "left", {}),
    "opt counts visible tokens": ("opt", "left", {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "gpt_oss mixes packed documents": (
        "gpt_oss",
        "packed",
        {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8},
    ),
    "qwen2, windows, packed": ("qwen2", "packed", {"use_sliding_window": True, "sliding_window": 6}),
    "recurrent layers": ("qwen3_5_text", "plain", HYBRID),
}


@pytest.mark.parametrize("case", SWITCHED)
def test_the_self_check_changes_no_number(two_ranks: Ranks, case: str) -> None:
    for checked, unchecked in two_ranks.run(with_and_without_verdict, *SWITCHED[case]):
        if isinstance(checked, str):
            assert checked == unchecked
        else:
            assert all(torch.equal(x, y) for x, y in zip(checked, unchecked, strict=True))
