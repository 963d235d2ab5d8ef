"""Uses of a prepared model besides training it: save, load, generate, prepare again, prepare two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hf_usp

from ..harness import fresh_accelerate, training_arguments
from ..ranks import Ranks
from ..tiny import HYBRID, batch_of, largest_difference, rows, tiny_model


def accelerator_for(ulysses: int) -> Any:
    from accelerate import Accelerator

    fresh_accelerate()
    return Accelerator(
        cpu=True, parallelism_config=hf_usp.UspParallelismConfig(cp_size=2, ulysses_degree=ulysses, gather_outputs=True)
    )


def two_and_again() -> dict[str, Any]:
    """Student and teacher prepared together, the student prepared again, then by another accelerator."""
    accelerator, batch = accelerator_for(1), batch_of("left")
    student, teacher = accelerator.prepare(tiny_model("llama"), tiny_model("qwen2", initializer_range=0.1))
    found = {"teacher": teacher(**batch).logits.detach()}
    for time in ("once", "wrapped", "unwrapped", "elsewhere"):
        if time == "elsewhere":
            accelerator = accelerator_for(2)
        if time != "once":
            student = accelerator.prepare(student if time == "wrapped" else accelerator.unwrap_model(student))
        output = student(**batch)
        student.zero_grad()
        accelerator.backward(output.loss)
        model = accelerator.unwrap_model(student)
        hooks = (len(model._forward_pre_hooks), len(model._forward_hooks))
        found[time] = (output.loss.item(), model.lm_head.weight.grad.clone(), hooks)
    found["teacher later"] = teacher(**batch).logits.detach()
    return found


def test_two_models_and_models_prepared_again(two_ranks: Ranks) -> None:
    student, teacher = tiny_model("llama", "eager"), tiny_model("qwen2", "eager", initializer_range=0.1)
    batch = batch_of("left")
    loss, logits = student(**batch).loss, teacher(**batch).logits
    loss.backward()
    real = batch["attention_mask"].bool()
    for mine in two_ranks.run(two_and_again):
        for time in ("teacher", "teacher later"):
            torch.testing.assert_close(mine[time][real], logits[real], atol=1e-5, rtol=1e-4)
        for time in ("once", "wrapped", "unwrapped", "elsewhere"):
            assert mine[time][0] == pytest.approx(loss.item(), abs=1e-5), time
            torch.testing.assert_close(mine[time][1], student.lm_head.weight.grad, atol=1e-6, rtol=1e-4)
            assert mine[time][2] == mine["once"][2]


def train(folder: str, sharded: bool, generates: bool = True) -> dict[str, Any]:
    """Three steps of the stock Trainer, which generates after each and saves the model at the end."""
    from transformers import Trainer, TrainerCallback

    fresh_accelerate()
    generated: list[list[int]] = []

    class Generates(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model, prompt = kwargs["model"], torch.tensor([[3, 9, 27, 18, 54]])
            for cached in (True, False):
                ids = model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=cached, eos_token_id=63)
                generated.append(ids[0].tolist())

    config = hf_usp.UspParallelismConfig(cp_size=2, ulysses_degree=2) if sharded else None
    model = tiny_model("qwen2", "usp" if sharded else "sdpa", initializer_range=0.2)
    args = training_arguments(
        folder,
        max_steps=3,
        parallelism_config=config,
        per_device_train_batch_size=2,
        learning_rate=1.0,
        optim="sgd",
        save_strategy="no",
    )
    callbacks: list[Any] = [Generates()] if generates else []
    trainer = Trainer(model=model, args=args, train_dataset=rows(8, 39), callbacks=callbacks)
    trainer.train()
    trainer.save_model(folder)
    return {"generated": generated, "weights": {n: p.detach().clone() for n, p in model.named_parameters()}}


def test_generating_while_it_trains_and_loading_what_it_saved(two_ranks: Ranks, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    reference = train(str(tmp_path / "one"), False)
    assert len({tuple(ids) for ids in reference["generated"]}) > 1
    for mine in two_ranks.run(train, str(tmp_path / "mesh"), True):
        assert mine["generated"] == reference["generated"]
        assert largest_difference(mine["weights"], reference["weights"]) < 1e-6
    # Nothing of ours is in what was saved: it loads where hf_usp is not installed.
    assert "usp" not in (tmp_path / "mesh" / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "mesh")
    assert loaded.config._attn_implementation == "sdpa"
    assert largest_difference(dict(loaded.named_parameters()), mine["weights"]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "mesh", attn_implementation="usp")
    batch = batch_of("packed")
    torch.testing.assert_close(again(**batch).logits, loaded(**batch).logits)


def saved_whole(what: str) -> tuple[float, float, float, str]:
    """The loss of a prepared model, of the same saved whole and loaded, and of the latter prepared again."""
    import io

    from accelerate import Accelerator

    accelerator_for(1)  # resets what the last one left
    batch = batch_of("right")
    options: dict[str, Any] = {}
    if what == "in chunks":
        options = {"loss_chunk_size": 16, "mlp_chunk_size": 16}
    config = hf_usp.UspParallelismConfig(cp_size=2, ulysses_degree=2, **options)
    accelerator = Accelerator(cpu=True, parallelism_config=config)
    if what == "head":
        from transformers import LlamaForTokenClassification

        torch.manual_seed(0)
        stock = LlamaForTokenClassification._from_config(
            tiny_model(classifier_dropout=0.0).config, attn_implementation="usp", dtype=torch.float32
        )
        batch["labels"] = batch["labels"].clamp(-100, 1)
    else:
        stock = tiny_model(
            "qwen3_5_text" if what == "recurrent" else "llama", **(HYBRID if what == "recurrent" else {})
        )
    model = accelerator.prepare(stock.train())
    output = model(**batch)
    accelerator.backward(output.loss)
    file = io.BytesIO()
    torch.save(accelerator.unwrap_model(model), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    found = loaded(**batch)
    again = accelerator.prepare(loaded)(**batch)
    return output.loss.item(), found.loss.item(), again.loss.item(), str(tuple(found.logits.shape[:2]))


@pytest.mark.parametrize("what", ["plain", "head", "recurrent", "in chunks"])
def test_a_model_that_is_saved_whole_loads_as_an_ordinary_one(two_ranks: Ranks, what: str) -> None:
    for sharded, loaded, again, tokens in two_ranks.run(saved_whole, what):
        assert sharded == pytest.approx(loaded, abs=1e-5) == again
        assert tokens == "(2, 37)", "the loaded model computes whole rows"
