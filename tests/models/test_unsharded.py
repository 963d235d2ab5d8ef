"""Never unsharded in silence: a prepared model is sharded or refuses, whoever calls it and whichever part of it."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_usp
from hf_usp.models import unsharded
from hf_usp.models.hooks import get_hooks
from hf_usp.models.unsharded import CACHES, MARK

from ..harness import prepared_modules, taken_gradients
from ..integrations.cpu_accelerator import cpu_as_accelerator
from ..ranks import Ranks
from ..tiny import HYBRID, batch_of, largest_difference, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing")


def averaged(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean over ranks, for a model that was called past DDP."""
    for grad in grads.values():
        torch.distributed.all_reduce(grad)
        grad /= torch.distributed.get_world_size()
    return grads


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(hf_usp.UspModelError) as problem:
        call()
    return str(problem.value)


class TwoModels(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second


def ways_around() -> dict[str, Any]:
    """All ways in which a prepared model may be called besides `model(**batch)`, of one model."""
    from transformers import DynamicCache

    model, batch = tiny_model("llama"), batch_of("left")
    twin = tiny_model("llama")
    before = inspect.signature(model.forward)
    wrapped = prepared_modules(model)
    ids, tokens = batch["input_ids"], {n: batch[n] for n in ("input_ids", "attention_mask")}
    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    found: dict[str, Any] = {"name": name}
    assert inspect.signature(model.forward) == before

    model.train()
    found["refused"] = [
        refusal(
            lambda: model.model.layers[0](torch.zeros(2, 37, 32), position_embeddings=(torch.zeros(1, 37, 8),) * 2)
        ),
        refusal(lambda: wrapped(ids, **{name: DynamicCache()})),
        refusal(lambda: wrapped(**batch, logits_to_keep=3)),
    ]
    found["forward"] = model.forward(ids).logits.detach()
    # A loss of logits beside the model's own: its gradient is refused, looking at them is not.
    output = wrapped(**batch)
    (output.loss + 0 * output.logits.square().mean() + output.logits.detach().mean()).backward()
    output = wrapped(**batch, output_hidden_states=True)
    found["penalties"] = [
        refusal(lambda: output.logits.square().mean().backward(retain_graph=True)),
        refusal(lambda: output.hidden_states[1].mean().backward()),
    ]
    model.zero_grad()

    # Sharded, though the hooks of the module are not what is called; with recomputed layers, too.
    model.gradient_checkpointing_enable({"use_reentrant": False})
    output = model.forward(**batch)
    output.loss.backward()
    found["direct"] = (output.logits.shape[1], output.loss.item(), averaged(taken_gradients(model)))
    model.gradient_checkpointing_disable()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
        found["copy"] = other.forward(**batch).loss.item()
        assert model.forward(**batch).loss.item() == pytest.approx(found["direct"][1])
    found["loaded"] = pickle.loads(pickle.dumps(getattr(model.model.layers[0].self_attn, MARK)))

    # Outside of training all is as it was: a full batch is computed by whoever gets it.
    model.eval()
    cached = wrapped(ids, **{name: DynamicCache()})
    hidden, last = model.model(ids).last_hidden_state, wrapped(ids, logits_to_keep=1).logits
    found["whole"] = [hidden.detach(), last.detach(), cached.logits.detach(), cached[name].get_seq_length()]
    with torch.no_grad():
        found["share"] = wrapped(**batch).logits.shape[1]
        found["last"] = [wrapped(ids, logits_to_keep=n).logits for n in (1, 5)]
        found["generated"] = model.train().generate(ids[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)

    hooks = get_hooks(model)
    assert hooks is not None
    hooks.remove()
    assert "forward" not in vars(model)
    assert not any(MARK in vars(module) for module in model.modules())
    model(**tokens).logits.sum().backward()

    pair = TwoModels(tiny_model("qwen2"), twin)
    prepared_modules(pair)
    found["refused"].append(refusal(lambda: pair.second(ids)))
    alone = prepared_modules(twin)  # the remedy
    found["alone"] = alone(**tokens).logits.detach()
    return found


def test_ways_around_a_prepared_model(two_ranks: Ranks) -> None:
    from transformers import DynamicCache

    model, batch = tiny_model("llama", "sdpa"), batch_of("left")
    ids, length = batch["input_ids"], batch["input_ids"].shape[1]
    loss = model(**batch).loss
    loss.backward()
    reference = taken_gradients(model)
    real = batch["attention_mask"].bool()
    generated = model.generate(ids[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    for mine in two_ranks.run(ways_around):
        texts = [
            "full batch in a training step",
            f"{mine['name']} together with labels, or in a training step",
            "logits_to_keep together with labels",
            "full batch in a training step",
        ]
        assert len(texts) == len(mine["refused"])
        assert all(text in message for text, message in zip(texts, mine["refused"], strict=True))
        assert "`logits`" in mine["penalties"][0]
        assert "`hidden_states`" in mine["penalties"][1]
        assert all("gather_outputs=True" in message for message in mine["penalties"])
        torch.testing.assert_close(mine["forward"], model.train()(ids).logits, atol=1e-5, rtol=1e-4)
        tokens, direct, grads = mine["direct"]
        assert tokens == mine["share"] < length
        assert direct == pytest.approx(loss.item(), abs=1e-6)
        assert largest_difference(grads, reference) < 1e-6
        assert mine["copy"] == pytest.approx(torch.tensor(64.0).log().item())
        assert mine["loaded"] is False
        hidden, last, logits, cached = mine["whole"]
        model.eval()
        torch.testing.assert_close(hidden, model.model(ids).last_hidden_state)
        for some in (last, *mine["last"]):
            torch.testing.assert_close(some, model(ids, logits_to_keep=some.shape[1]).logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logits, model(ids, **{mine["name"]: DynamicCache()}).logits)
        assert cached == length
        assert torch.equal(mine["generated"], generated)
        torch.testing.assert_close(mine["alone"][real], model(**batch).logits[real], atol=1e-5, rtol=1e-4)


KEPT = (5, torch.tensor([3, 36, 20, 3, -2]))  # last tokens, of one rank or two; positions in any order


def own_losses(model: Any, batch: dict[str, Tensor], labels: bool) -> Tensor:
    """Losses that people make of what a model returns: cross-entropy by hand, of last tokens, a penalty, of some."""
    output = model(batch["input_ids"], labels=batch["labels"] if labels else None, output_hidden_states=True)
    logits, last = output.logits, nn.functional.normalize(output.hidden_states[-1][:, -1], dim=-1)
    manual_loop = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    contrast = nn.functional.cross_entropy(last @ last.T * 3, torch.arange(len(last)))
    some = [model(batch["input_ids"], logits_to_keep=keep).logits for keep in KEPT]
    kept = [x.softmax(-1)[..., 7].pow(2).sum() * (1 + torch.arange(x.shape[1])).sum() for x in some]
    # The base model by itself, and the head by itself (TRL's distillation).
    hidden = model.base_model(batch["input_ids"], attention_mask=torch.ones_like(batch["input_ids"])).last_hidden_state
    apart = model.get_output_embeddings()(hidden[:, -9:]).logsumexp(-1).mean()
    others = [apart, *kept, *([output.loss] if labels else [])]
    return torch.stack([manual_loop, contrast, logits.square().mean(), *others])


def made_outside(ulysses: int, gather: bool | None) -> list[Any]:
    """Losses and gradients by one process (`ulysses` 0) or two."""
    model: Any = tiny_model("qwen2", "usp" if ulysses else "sdpa")
    if ulysses:
        mesh = hf_usp.UspMesh.build(ring_degree=2 // ulysses, ulysses_degree=ulysses)
        hf_usp.apply_context_parallel(model, mesh, gather_outputs=gather)
    found = []
    for labels in (False, True) if gather or not ulysses else (False,):
        losses = own_losses(model, batch_of("plain"), labels)
        losses.sum().backward()
        gradients = taken_gradients(model)
        found.append((losses.tolist(), averaged(gradients) if ulysses else gradients))
    return found


@pytest.mark.parametrize(("ulysses", "gather"), [(1, None), (1, True), (2, None)])
def test_losses_made_outside_are_exact(two_ranks: Ranks, ulysses: int, gather: bool | None) -> None:
    reference = made_outside(0, None)
    for mine in two_ranks.run(made_outside, ulysses, gather):
        assert len(mine) == (2 if gather else 1)
        for (losses, grads), (right, right_grads) in zip(mine, reference, strict=False):
            assert losses == pytest.approx(right, abs=1e-5)
            assert largest_difference(grads, right_grads) < 1e-6


def not_gathered() -> list[str]:
    """With `gather_outputs=False` a loss outside the model is refused; logits of some tokens come whole even then."""
    wrapped, ids = prepared_modules(tiny_model("llama"), gather_outputs=False), batch_of("plain")["input_ids"]
    with torch.no_grad():
        assert wrapped(ids).logits.shape[1] < ids.shape[1]
        assert wrapped(ids, logits_to_keep=7).logits.shape[1] == 7
        found = [refusal(lambda: wrapped(ids, num_items_in_batch=9))]
    return [*found, refusal(lambda: wrapped(ids)), refusal(lambda: wrapped(ids, logits_to_keep=7))]


def test_losses_made_outside_are_refused_of_shares(two_ranks: Ranks) -> None:
    for messages in two_ranks.run(not_gathered):
        assert all("without labels: a loss will be made outside" in message for message in messages)
        assert ["label smoothing" in message for message in messages] == [True, False, False]


def bad_positions() -> list[str]:
    """Positions that no row has, and those of each row; on one rank alone."""
    wrapped, ids = prepared_modules(tiny_model("llama")), batch_of("plain")["input_ids"]
    found, rank = [], torch.distributed.get_rank()
    for keep in (torch.tensor([36, 37]), torch.tensor([[1], [2]])):
        with pytest.raises(hf_usp.UspError) as problem:
            wrapped(ids, logits_to_keep=keep if rank else 3)
        found.append(str(problem.value))
    return found


def test_positions_that_rows_do_not_share_are_refused(two_ranks: Ranks) -> None:
    for messages in two_ranks.run(bad_positions):
        assert ["logits_to_keep of shape" in message for message in messages] == [True, True]


class Prompted(nn.Module):
    """A trained prompt before the embeddings that a model is given, as prompt tuning has it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model, self.prompt = model, nn.Parameter(torch.randn(1, 3, 32))
        model.get_input_embeddings().requires_grad_(False)  # unused; DDP wants a gradient for every parameter

    def forward(self, embeddings: Tensor, labels: Tensor, **keywords: Any) -> Any:
        count = len(embeddings)
        embeddings = torch.cat([self.prompt.expand(count, -1, -1), embeddings], dim=1)
        labels = torch.cat([torch.full((count, 3), -100), labels], dim=1)
        return self.model(inputs_embeds=embeddings, labels=labels, **keywords)


def embeddings_given(ranks: int) -> list[dict[str, Tensor]]:
    """Gradients of a leaf, and of parameters behind and after it: mean loss, a token count, a loss outside, by hand."""
    batch, found = batch_of("plain"), []
    torch.manual_seed(2)
    given = torch.randn(2, 37, 32)
    items = int((batch["labels"][:, 1:] != -100).sum())
    for gather in (False, True):
        module = Prompted(tiny_model("llama", "usp" if ranks > 1 else "sdpa"))
        wrapped: Any = prepared_modules(module, gather_outputs=gather) if ranks > 1 else module
        for keywords in ({}, {"num_items_in_batch": 2 * items}):
            leaf = given.clone().requires_grad_()
            output = wrapped(leaf, batch["labels"], **keywords)
            loss = output.loss + (output.logits.square().mean() if gather and not keywords else 0)
            loss.backward()
            assert leaf.grad is not None
            found.append({"leaf": leaf.grad, **taken_gradients(module)})
    return found


def manual_loop() -> Tensor:
    mesh = hf_usp.UspMesh.build(ring_degree=2, ulysses_degree=1)
    torch.manual_seed(2)
    leaf = torch.randn(2, 37, 32, requires_grad=True)
    model = tiny_model("llama")
    model(**hf_usp.shard({"inputs_embeds": leaf, "labels": batch_of("plain")["labels"]}, mesh)).loss.backward()
    assert leaf.grad is not None
    return leaf.grad


def test_the_gradient_of_given_embeddings_is_that_of_one_process(two_ranks: Ranks) -> None:
    reference = embeddings_given(1)
    for mine in two_ranks.run(embeddings_given, 2):
        for here, there in zip(mine, reference, strict=True):
            assert largest_difference(here, there) < 1e-6
    torch.manual_seed(2)
    leaf = torch.randn(2, 37, 32, requires_grad=True)
    tiny_model("llama", "sdpa")(inputs_embeds=leaf, labels=batch_of("plain")["labels"]).loss.backward()
    for grad in two_ranks.run(manual_loop):
        torch.testing.assert_close(grad, leaf.grad, atol=1e-7, rtol=1e-4)


def recurrences() -> list[str]:
    """Layers without attention know it too; a model of nothing else."""
    settings: dict[str, Any] = {
        "num_hidden_layers": 1,
        "state_size": 8,
        "conv_kernel": 4,
        "expand": 2,
        "time_step_rank": 4,
    }
    mamba, hybrid = tiny_model("mamba", **settings), tiny_model("qwen3_next", **HYBRID)
    found = []
    for model in (mamba, hybrid):
        wrapped, batch = prepared_modules(model), batch_of("plain")
        body = model.train().base_model
        layer = body.layers[0]
        mixer = layer.mixer if hasattr(layer, "mixer") else layer.linear_attn
        found.append(refusal(partial(mixer, torch.zeros(2, 37, 32))))
        wrapped(**batch).loss.backward()
        body.eval()(batch["input_ids"])
    return found


def test_recurrent_layers_refuse_too(two_ranks: Ranks) -> None:
    for messages in two_ranks.run(recurrences):
        assert all("full batch in a training step" in message for message in messages)
        assert "MambaMixer" in messages[0]
        assert "GatedDeltaNet" in messages[1]


# Of one layer, or of a loop over layers: never a keyword of a model that can be prepared.
OF_A_LAYER = {"layer_past", "layer_state"}


def test_every_keyword_that_means_a_cache_is_known() -> None:
    """In the source of all models: what is annotated as a cache, and XLNet's `mems`, which are tensors."""
    import transformers

    parameter = re.compile(r"^\s+(\w+)\s*:\s*[^#=\n]*?\w*Cache\b[^#=\n]*(=\s*None)?,\s*$", re.M)
    found: dict[str, str] = {}
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        found |= {match[1]: path.name for match in parameter.finditer(path.read_text())}
    assert found.keys() & {"past_key_values", "cache"}
    assert {"padding_cache", "past_buckets_states"} <= found.keys()
    unknown = {name: place for name, place in found.items() if name not in CACHES and name not in OF_A_LAYER}
    assert not unknown


def reference_model() -> tuple[Tensor, int]:
    """A trainer's reference model that TRL wraps in FSDP2 itself, past `prepare`; its fused log-probabilities."""
    from trl.models import prepare_fsdp
    from trl.trainer.utils import add_fused_lm_head

    from ..integrations.cpu_accelerator import fsdp2

    class Trainer:
        def __init__(self) -> None:
            self.model, reference = tiny_model("llama"), tiny_model("llama", initializer_range=0.1)
            add_fused_lm_head(reference, outputs=("log_probs",))
            self.accelerator = fsdp2(self.model, {"cp_size": 2, "ulysses_degree": 1})
            self.ref_model: Any = prepare_fsdp(reference, self.accelerator)

        def train(self) -> Any:
            return self.accelerator.prepare(self.model, torch.optim.SGD(self.model.parameters()))

    with cpu_as_accelerator(), torch.no_grad():
        trainer, seen = Trainer(), []
        trainer.train()
        layer = trainer.ref_model.model.layers[0]
        layer.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
        return trainer.ref_model(**batch_of("plain"), fused_lm_head=True).log_probs, seen[-1]


def test_a_reference_model_that_trl_wraps_is_sharded(two_ranks: Ranks) -> None:
    from trl.trainer.utils import add_fused_lm_head

    alone = tiny_model("llama", "sdpa", initializer_range=0.1)
    add_fused_lm_head(alone, outputs=("log_probs",))
    with torch.no_grad():
        right = alone(**batch_of("plain"), fused_lm_head=True).log_probs
    for log_probs, tokens in two_ranks.run(reference_model):
        assert tokens == 20
        torch.testing.assert_close(log_probs, right, atol=1e-5, rtol=1e-5)


class Lines(logging.Handler):
    """The log of `tell_of_full_sequences` while it is attached."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __enter__(self) -> list[str]:
        unsharded.logger.warning_once.cache_clear()  # this process may have said it before
        unsharded.logger.addHandler(self)
        return self.found

    def __exit__(self, *problem: Any) -> None:
        unsharded.logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


def told(mesh: bool) -> tuple[list[str], list[str], Tensor]:
    """Lines of a prepared model's calls, of those of a second one that is not prepared; its logits."""
    model, second, ids = tiny_model("llama"), tiny_model("qwen2"), batch_of("plain")["input_ids"]
    if mesh:
        hf_usp.apply_context_parallel(model, hf_usp.UspMesh.build(ring_degree=2, ulysses_degree=1))
    with Lines() as prepared, torch.no_grad():
        model(ids)
        model.eval()(ids)
        model.generate(ids[:1], max_new_tokens=2, do_sample=False, pad_token_id=0)  # whole, as it is meant to be
    with Lines() as other:
        logits = [second(ids).logits for _ in range(2)]
        second(ids[:, :1])  # a step has nothing to share
    assert torch.equal(*logits)
    return prepared, other, logits[0].detach()


def test_a_model_that_nobody_prepared_says_so_once(two_ranks: Ranks) -> None:
    prepared, other, right = told(False)
    assert prepared == other == []  # without a mesh there is nothing to say
    for prepared, other, logits in two_ranks.run(told, True):
        assert prepared == []
        assert len(other) == 1 and "Qwen2Attention of a model that is not prepared runs full sequences" in other[0]
        assert "accelerator.prepare_model(model)" in other[0]
        torch.testing.assert_close(logits, right)
