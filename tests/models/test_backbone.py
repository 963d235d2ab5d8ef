"""Heads on causal backbones and encoders: loss, outputs and every gradient equal the eager single-process model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import hf_usp

from ..harness import fresh_accelerate, prepare, relative, step_errors, training_arguments
from ..ranks import Ranks
from ..tiny import SIZES, batch_of, largest_difference

ENCODER = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
MODERN = {
    "global_attn_every_n_layers": 2,
    "local_attention": 8,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "num_hidden_layers": 3,
}
# Case -> model type, class of Transformers, settings.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama sequence": ("llama", "LlamaForSequenceClassification", {"num_labels": 3}),
    "llama token": ("llama", "LlamaForTokenClassification", {"num_labels": 5, "classifier_dropout": 0.0}),
    "qwen3 answer": ("qwen3", "Qwen3ForQuestionAnswering", {"head_dim": 16}),
    "qwen2 regression": ("qwen2", "Qwen2ForSequenceClassification", {"num_labels": 1}),
    "bert masked": ("bert", "BertForMaskedLM", ENCODER),
    "bert sequence": ("bert", "BertForSequenceClassification", {**ENCODER, "num_labels": 3}),
    "roberta token": ("roberta", "RobertaForTokenClassification", {**ENCODER, "num_labels": 5}),
    "bert both": ("bert", "BertForPreTraining", ENCODER),
    "modernbert masked": ("modernbert", "ModernBertForMaskedLM", MODERN),
    "modernbert mean": (
        "modernbert",
        "ModernBertForSequenceClassification",
        {**MODERN, "num_labels": 3, "classifier_pooling": "mean"},
    ),
    "modernbert token": ("modernbert", "ModernBertForTokenClassification", {**MODERN, "num_labels": 5}),
}


def head_model(case: str, attention: str) -> Any:
    """A tiny random model, the same weights in every process."""
    import transformers

    family, name, changes = CASES[case]
    # The Trainer turns the cache off as well; with one, documents told apart by position_ids see each other.
    config = transformers.AutoConfig.for_model(family, **{**SIZES, "use_cache": False, **changes})
    torch.manual_seed(0)
    return getattr(transformers, name)._from_config(config, attn_implementation=attention)


def head_batch(case: str, kind: str, rows: int = 2) -> dict[str, Tensor]:
    """A batch whose labels are what the head wants."""
    batch = batch_of(kind, rows)
    ids, labels = batch["input_ids"], batch.pop("labels")
    generator = torch.Generator().manual_seed(3)
    family, task = case.split()
    if kind == "right" and family in ("llama", "roberta"):
        batch["input_ids"] = ids.masked_fill(batch["attention_mask"] == 0, SIZES["pad_token_id"])
    if task in ("sequence", "mean"):
        batch["labels"] = torch.randint(3, (rows,), generator=generator)
    elif task == "regression":
        batch["labels"] = torch.rand(rows, generator=generator)
    elif task == "answer":
        batch["start_positions"], batch["end_positions"] = torch.tensor([11, 19])[:rows], torch.tensor([14, 21])[:rows]
    elif task == "token":
        batch["labels"] = torch.where(labels < 0, labels, labels % 5)
    else:
        batch["labels"] = labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.6, -100)
    if task == "both":
        batch["next_sentence_label"] = torch.tensor([0, 1])[:rows]
    if family == "bert":
        batch["token_type_ids"] = (torch.arange(ids.shape[1]) > 15).long().expand_as(ids).contiguous()
    return batch


def head_errors(case: str, kind: str) -> dict[str, float]:
    model = prepare(head_model(case, "usp").train(), 2, 2)
    # Answers are sought among all tokens: left padding, which sees nothing, takes part and is zero as in sdpa.
    reference = head_model(case, "sdpa" if (case, kind) == ("qwen3 answer", "left") else "eager")
    return step_errors(model, reference.train(), head_batch(case, kind))


KINDS = [(case, kind) for case in CASES for kind in ("plain", "right", "left")]


@pytest.mark.parametrize(("case", "kind"), [*KINDS, ("llama token", "packed")])
def test_head_equals_eager(four_ranks: Ranks, case: str, kind: str) -> None:
    for errors in four_ranks.run(head_errors, case, kind):
        assert max(errors.values()) < 1e-4, {name: e for name, e in errors.items() if not e < 1e-4}


def train(folder: str, case: str, accumulation: int, cp_size: int | None) -> dict[str, Any]:
    """Train and evaluate a head with the stock Trainer on rows padded on the right; one process without `cp_size`."""
    from transformers import Trainer

    fresh_accelerate()
    model = head_model(case, "usp" if cp_size else "eager")
    batch = head_batch(case, "right", 8)
    args = training_arguments(
        folder,
        save_strategy="no",
        optim="sgd",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        max_steps=3,
        logging_steps=1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        parallelism_config=hf_usp.UspParallelismConfig(cp_size=cp_size, ulysses_degree=2) if cp_size else None,
    )
    rows = [{name: value[i] for name, value in batch.items()} for i in range(8)]
    trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows[:7])
    trainer.train()
    return {
        "losses": [h["loss"] for h in trainer.state.log_history if "loss" in h],
        "norms": [h["grad_norm"] for h in trainer.state.log_history if "grad_norm" in h],
        "evaluation": [trainer.evaluate()["eval_loss"]],
        "predicted": torch.from_numpy(trainer.predict(rows[:7]).predictions).flatten().tolist(),
        "weights": {name: p.detach().clone() for name, p in model.state_dict().items()},
    }


@pytest.mark.parametrize("case", ["llama sequence", "modernbert masked", "bert sequence"])
def test_the_stock_trainer_follows_one_process(four_ranks: Ranks, tmp_path: Path, case: str) -> None:
    """ModernBERT's loss takes num_items_in_batch, the others ignore it."""
    expected = train(str(tmp_path), case, 2, None)
    for mine in four_ranks.run(train, str(tmp_path), case, 2, 4):
        for name in ("losses", "norms", "evaluation"):
            assert mine[name] == pytest.approx(expected[name], rel=1e-4), name
        assert largest_difference(mine["weights"], expected["weights"]) < 1e-5
        assert len(mine["predicted"]) == len(expected["predicted"])
        if case != "modernbert masked":  # logits of padding are anybody's
            assert mine["predicted"] == pytest.approx(expected["predicted"], abs=1e-4)


class TwoInputs(torch.nn.Module):
    """A pooler of a kind that is not pooled again from whole hidden states."""

    def __init__(self, pooler: torch.nn.Module) -> None:
        super().__init__()
        self.pooler = pooler

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Tensor:
        return self.pooler(scale * hidden_states)


def refusal(how: str) -> str:
    """The message of a refused model or batch."""
    import transformers

    case = "bert masked" if how == "tensor" else "bert sequence"
    model, batch = head_model(case, "usp"), head_batch(case, "right")
    if how == "pooler":
        model.bert.pooler = TwoInputs(model.bert.pooler)
    elif how == "albert":
        config = transformers.AutoConfig.for_model("albert", **{**SIZES, **ENCODER, "embedding_size": 32})
        model = transformers.AlbertForSequenceClassification._from_config(config, attn_implementation="usp")
    elif how == "tensor":
        batch["hint"] = torch.zeros(2, 37)
    elif how == "choices":
        model = transformers.BertForMultipleChoice._from_config(model.config, attn_implementation="usp")
        batch = {"input_ids": batch["input_ids"][:, None].expand(-1, 3, -1), "labels": torch.tensor([0, 2])}
    with pytest.raises(hf_usp.UspError) as error:
        prepare(model, 2, 2)(**batch)
    return str(error.value)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("pooler", "logits differs"),
        ("albert", "logits"),
        ("tensor", "BertModel gets the tensor.* hint"),
        ("choices", "fails on a short random batch"),
    ],
)
def test_what_is_not_exact_is_refused(four_ranks: Ranks, how: str, words: str) -> None:
    for message in four_ranks.run(refusal, how):
        assert re.search(words, message), message


def loss_outside() -> float:
    """Relative error of the gradients of a loss by hand of a classifier's logits, which every rank has in full."""
    models = [head_model("bert sequence", attention) for attention in ("usp", "eager")]
    batch = head_batch("bert sequence", "right")
    labels = batch.pop("labels")
    prepared = prepare(models[0], 2, 2)
    for model, extra in ((prepared, {"num_items_in_batch": torch.tensor(2)}), (models[1], {})):
        torch.nn.functional.cross_entropy(model(**batch, **extra).logits, labels).backward()
    error = 0.0
    for parameter, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        if other.grad is not None:
            dist.all_reduce(parameter.grad)
            error = max(error, relative(parameter.grad / dist.get_world_size(), other.grad, 1e-2))
    return error


def test_a_loss_by_hand_of_a_head_s_logits(four_ranks: Ranks) -> None:
    assert max(four_ranks.run(loss_outside)) < 1e-4


def pooled_features() -> float:
    """Relative error of pooled features and their gradients where the encoder is prepared without a head."""
    import transformers

    models = []
    for attention in ("usp", "eager"):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model("bert", **{**SIZES, **ENCODER})
        models.append(transformers.BertModel._from_config(config, attn_implementation=attention))
    ids = head_batch("bert sequence", "plain")["input_ids"]
    mine, theirs = prepare(models[0], 2, 2)(input_ids=ids).pooler_output, models[1](input_ids=ids).pooler_output
    error = relative(mine.detach(), theirs.detach())
    for pooled in (mine, theirs):
        pooled.square().sum().backward()
    for parameter, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        dist.all_reduce(parameter.grad)
        error = max(error, relative(parameter.grad / dist.get_world_size(), other.grad, 1e-2))
    return error


def test_features_are_pooled_from_whole_sequences(four_ranks: Ranks) -> None:
    assert max(four_ranks.run(pooled_features)) < 1e-4
