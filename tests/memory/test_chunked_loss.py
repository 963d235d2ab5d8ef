"""The loss in chunks: the loss, gradients and steps of whole logits, which never exist; refused where it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from counting import Peak
from torch import nn

import hf_usp
from hf_usp.config import UspParallelismConfig
from hf_usp.distributed.loss import VocabularyPart
from hf_usp.memory.chunked_loss import ChunkedLoss
from hf_usp.memory.linear_cross_entropy import ChunkedLinearCrossEntropy, LMHead

from ..harness import compare, one_process, run_trainer, step
from ..ranks import Ranks
from ..tiny import batch_of, largest_difference, rows, tiny_model

# Between head and loss: nothing, tied weights, tanh of a softcap, a factor, a divisor, a bias.
HEADS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 3.0, "head_dim": 16},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "phi": {},
}


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("items", [None, 50])
def test_equal_to_whole_logits(family: str, items: int | None) -> None:
    model = tiny_model(family, "eager", **HEADS[family])
    if family == "phi":
        nn.init.normal_(model.lm_head.bias)
    batch = {**batch_of("plain"), **({} if items is None else {"num_items_in_batch": items})}
    loss, gradients, output = step(model, **batch)
    assert output.logits.shape == (2, 37, 64)
    hooks = ChunkedLoss(model, 7)
    for _ in range(2):
        mine, mine_gradients, output = step(model, **batch)
        assert output.logits is None
        assert "logits" not in output
        assert mine == pytest.approx(loss, rel=1e-6)
        assert largest_difference(mine_gradients, gradients) < 1e-6
    # Without labels, and once the hooks are gone, the model is as it was.
    assert model(batch["input_ids"]).logits.shape == (2, 37, 64)
    hooks.remove()
    assert step(model, **batch)[2].logits.shape == (2, 37, 64)


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bf16_errs_as_whole_logits_do(how: str) -> None:
    batch = batch_of("plain", rows_count=4)
    truth = step(tiny_model(attention="sdpa"), **batch)[1]["lm_head.weight"]
    model = tiny_model(attention="sdpa", dtype=torch.bfloat16 if how == "weights" else torch.float32)
    errors = []
    for chunk in (None, 5):
        if chunk is not None:
            ChunkedLoss(model, chunk)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            gradients = step(model, **batch)[1]
        assert gradients["lm_head.weight"].dtype == model.dtype
        errors.append((gradients["lm_head.weight"] - truth).norm().item())
    assert 0 < errors[1] <= 1.25 * errors[0]


def test_the_peak_is_without_the_logits() -> None:
    """A step at 2,048 tokens and 8,192 entries: beyond the chunk, hidden states and weights are all there is."""
    torch.manual_seed(0)
    model = tiny_model(attention="sdpa", vocab_size=8192, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    ids = torch.randint(3, 8192, (1, 2048))
    peaks = []
    for chunk in (None, 64):
        if chunk is not None:
            ChunkedLoss(model, chunk)
        with Peak() as watch:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        peaks.append(watch.peak)
    logits, of_a_chunk, rest = 2048 * 8192 * 4, 64 * 8192 * 4, 4 * 8192 * 16 * 4 + 6 * 2**20
    assert peaks[0] > 2 * logits
    assert peaks[1] < 5 * of_a_chunk + rest < peaks[0] / 5


@pytest.mark.parametrize("mesh", [(4, 2, "zigzag"), (2, 1, "auto")], ids=str)
def test_the_stock_trainer_on_a_mesh(four_ranks: Ranks, tmp_path: Path, mesh: Any) -> None:
    setup = {"rows": 12, "batch": 2, "accumulation": 2, "steps": 3, "evaluate": True, "eval_rows": 4, "family": "qwen2"}
    reference = one_process(setup)
    for mine in four_ranks.run(run_trainer, str(tmp_path), mesh, {**setup, "chunk": 3}):
        compare(mine, reference)
        assert mine["norms"] == pytest.approx(reference["norms"], rel=1e-4)
        if mesh[0] == 4:
            assert mine["evaluation"] == pytest.approx(reference["evaluation"], abs=1e-5)


def test_also_in_one_process(tmp_path: Path) -> None:
    setup = {"rows": 4, "batch": 2, "steps": 2, "chunk": 3}
    compare(one_process(setup), one_process({**setup, "chunk": None}))


def over_parts(entries: int, parts: bool, **how: Any) -> dict[str, torch.Tensor]:
    """Loss and gradients of a head in chunks, whole or by parts that the ranks share: then of this rank's rows."""
    torch.manual_seed(0)
    tokens = how.get("tokens", 23)
    hidden, weight, bias = torch.randn(tokens, 8), torch.randn(entries, 8), torch.randn(entries)
    hidden, weight, bias = (x.to(how.get("dtype", torch.float64)).requires_grad_() for x in (hidden, weight, bias))
    labels = torch.randint(0, entries, (tokens,)).index_fill(0, torch.tensor([2, 9]), -100)
    labels[4] = how.get("label", labels[4])
    rows = (weight, bias)
    if parts:
        start = dist.get_rank() * -(-entries // dist.get_world_size())
        mine = slice(start, start + -(-entries // dist.get_world_size()))
        rows = tuple(x.detach()[mine].requires_grad_() for x in rows)
    softcap = (lambda x: x.float() if how.get("dtype") else x, lambda x: 3 * torch.tanh(x / 3))
    head = LMHead(
        changes=softcap,
        chunk=how.get("chunk", 7),
        ignored=-100,
        smoothing=how.get("smoothing", 0.0),
        autocast=how.get("autocast"),
        part=VocabularyPart(dist.group.WORLD, min(start, entries), entries) if parts else None,
    )
    loss = ChunkedLinearCrossEntropy.apply(hidden, *rows, labels, head)
    (loss * 3).backward()
    return {"loss": loss.detach(), "hidden": hidden.grad, "weight": rows[0].grad, "bias": rows[1].grad}


@pytest.mark.parametrize(("entries", "smoothing"), [(66, 0.0), (66, 0.1), (5, 0.0)])
def test_a_vocabulary_that_ranks_share(four_ranks: Ranks, entries: int, smoothing: float) -> None:
    """66 entries are split as 17, 17, 17 and 15; of 5, the last rank has none."""
    whole = over_parts(entries, False, smoothing=smoothing)
    parts = four_ranks.run(over_parts, entries, True, smoothing=smoothing)
    for mine in parts:
        assert largest_difference(*({n: x[n] for n in ("loss", "hidden")} for x in (mine, whole))) < 1e-12
        assert torch.equal(mine["hidden"], parts[0]["hidden"])
    together = {name: torch.cat([mine[name] for mine in parts]) for name in ("weight", "bias")}
    assert largest_difference(together, {name: whole[name] for name in together}) < 1e-12


@pytest.mark.parametrize("how", [{"dtype": torch.bfloat16}, {"dtype": torch.float32, "autocast": torch.bfloat16}])
def test_a_shared_vocabulary_in_bf16(four_ranks: Ranks, how: dict[str, Any]) -> None:
    """It errs as one process does; gradients of hidden states are rounded once more, before they are added up."""
    truth, whole = over_parts(66, False), over_parts(66, False, **how)
    parts = four_ranks.run(over_parts, 66, True, **how)
    mine = {"hidden": parts[0]["hidden"], "weight": torch.cat([part["weight"] for part in parts])}
    for name, grad in mine.items():
        assert grad.dtype == how["dtype"]
        errors = [(x.double() - truth[name]).norm() for x in (grad, whole[name])]
        assert 0 < errors[0] <= (1.5 if name == "hidden" else 1.25) * errors[1]


def peak(parts: bool) -> int:
    """Bytes of a step with 512 tokens, all in one chunk, and 8,192 entries."""
    with Peak() as watch:
        over_parts(8192, parts, dtype=torch.float32, tokens=512, chunk=512)
    return watch.peak


def test_the_peak_is_that_of_the_own_entries(four_ranks: Ranks) -> None:
    """Logits of a quarter of the vocabulary, and what is made of them."""
    whole = peak(False)
    assert whole > 3 * 512 * 8192 * 4
    assert max(four_ranks.run(peak, True)) < 0.3 * whole


def test_a_label_that_no_rank_has(four_ranks: Ranks) -> None:
    for message in four_ranks.run(raised, label=66):
        assert "out of bounds" in message


def raised(**how: Any) -> str:
    try:
        over_parts(66, True, **how)
    except RuntimeError as problem:
        return str(problem)
    return ""


class Squared(nn.Linear):
    """A head that is not linear."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden * hidden)


def with_head(head: str) -> Any:
    from peft import LoraConfig, get_peft_model

    model = tiny_model(attention="sdpa")
    if head == "squared":
        model.lm_head = Squared(32, 64)
    elif head == "two layers":
        model.lm_head = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 64))
    elif head == "adapter":
        get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
    elif head == "looked at":
        model.lm_head.register_forward_hook(lambda m, a, logits: logits[:, :1])
    return model


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize(
    ("head", "named"),
    [("squared", "arithmetic"), ("two layers", "`linear`"), ("adapter", "`dtype`"), ("looked at", "arithmetic")],
)
def test_other_heads_are_refused_and_left_as_they_were(head: str, named: str) -> None:
    model = with_head(head)
    ChunkedLoss(model, 8)
    with pytest.raises(
        hf_usp.UspModelError, match=f"loss_chunk_size with a model that computes {named}.*one linear head"
    ):
        model(**batch_of("plain"))
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert model(batch_of("plain")["input_ids"]).logits.ndim == 3


def mean_of_maxima(outputs: Any, labels: torch.Tensor, **_: Any) -> torch.Tensor:
    return outputs.logits.amax(-1).mean()


def test_losses_that_need_all_logits(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    config = UspParallelismConfig(cp_size=1, loss_chunk_size=8)
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, parallelism_config=config)
    trainer = Trainer(tiny_model(), args, train_dataset=rows(2, 9), compute_loss_func=mean_of_maxima)
    with pytest.raises(hf_usp.UspModelError, match="outside the model .compute_loss_func.*needs all logits"):
        trainer.train()
    model = tiny_model()
    model.loss_function = mean_of_maxima
    with pytest.raises(hf_usp.UspModelError, match="and the loss mean_of_maxima.*needs all logits"):
        ChunkedLoss(model, 8)


def test_options_that_do_not_fit() -> None:
    from transformers import AutoModelForSequenceClassification

    with pytest.raises(hf_usp.UspConfigError, match="mlp_chunk_size=0"):
        UspParallelismConfig(cp_size=1, mlp_chunk_size=0)
    with pytest.raises(hf_usp.UspConfigError, match="loss_chunk_size=0"):
        UspParallelismConfig(cp_size=1, loss_chunk_size=0)
    with pytest.raises(hf_usp.UspConfigError, match="leaves no logits to be gathered"):
        UspParallelismConfig(cp_size=1, loss_chunk_size=8, gather_outputs=True)
    with pytest.raises(hf_usp.UspModelError, match="loss_chunk_size with LlamaForSequenceClassification"):
        ChunkedLoss(AutoModelForSequenceClassification.from_config(tiny_model().config), 8)
