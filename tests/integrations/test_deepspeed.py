"""DeepSpeed's ZeRO 1, 2 and 3 around the mesh, through the Trainer and through Accelerate, on the CPU.

Cases that need a GPU or compile kernels are in `tests/gpu`: fp16 with its loss scale, fused and offloaded Adam.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import hf_usp
from hf_usp.integrations.deepspeed import check_settings
from hf_usp.memory.chunked_loss import ChunkedLoss

from ..harness import fresh_accelerate, step
from ..ranks import Ranks
from ..tiny import batch_of, largest_difference, rows, tiny_model
from .cpu_accelerator import cpu_deepspeed

AUTO = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")


def settings(stage: int) -> dict[str, Any]:
    """A DeepSpeed config as in `configs/`, everything else from the Trainer."""
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0}
    return dict.fromkeys(AUTO, "auto") | {"zero_optimization": zero}


def train(folder: str, stage: int | None, mesh: dict[str, Any] | None, batch: int, **options: Any) -> dict[str, Any]:
    """Four steps of the stock Trainer on the model saved in `folder`; in one process without a `mesh`."""
    with cpu_deepspeed() if mesh is not None else nullcontext():
        from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

        fresh_accelerate()
        resume = options.pop("resume", None)
        args = TrainingArguments(
            output_dir=f"{folder}/out",
            report_to=[],
            disable_tqdm=True,
            use_cpu=mesh is None,
            max_steps=4,
            dataloader_pin_memory=False,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=2,
            logging_steps=1,
            learning_rate=0.05,
            lr_scheduler_type="linear",
            optim="sgd",
            optim_args="momentum=0.9",
            max_grad_norm=0.5,
            deepspeed=None if mesh is None else settings(stage or 0),
            parallelism_config=None if mesh is None else hf_usp.UspParallelismConfig(**mesh),
            **{"save_strategy": "no", **options},
        )
        attention = "eager" if mesh is None else "usp"
        # Made after the arguments: from_pretrained then partitions for ZeRO-3.
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32)
        losses_of: set[str] = set()  # seen before the hooks of the loss in chunks
        model.register_forward_hook(lambda m, args, output: losses_of.add(type(output.get("logits")).__name__))
        trainer = Trainer(model=model, args=args, train_dataset=rows(40, 40), eval_dataset=rows(4, 40, False))
        trainer.train(resume_from_checkpoint=resume)
        logs = trainer.state.log_history
        result = {
            "losses": [entry["loss"] for entry in logs if "loss" in entry],
            "norms": [entry["grad_norm"] for entry in logs if "grad_norm" in entry],
            "evaluation": trainer.evaluate()["eval_loss"],
            "losses_of": losses_of,
        }
        trainer.save_model(f"{folder}/saved")  # whole weights, of ZeRO-3 too
        return result


def weights(folder: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(f"{folder}/saved/model.safetensors")


def saved_model(folder: Path, **changes: Any) -> str:
    tiny_model("llama", "eager", **changes).save_pretrained(folder)
    return str(folder)


# (stage, mesh, rows of a rank in a forward): eight rows a step each
RUNS = [
    (1, {"cp_size": 2, "ulysses_degree": 1}, 2),
    (2, {"cp_size": 4, "ulysses_degree": 2}, 4),
    (3, {"cp_size": 2, "ulysses_degree": 2}, 2),
]


@pytest.mark.parametrize("stage, mesh, batch", RUNS, ids=str)
def test_the_trainer_follows_one_process(
    four_ranks: Ranks, tmp_path: Path, stage: int, mesh: dict[str, Any], batch: int
) -> None:
    one, many = saved_model(tmp_path / "one"), saved_model(tmp_path / "many")
    reference = train(one, None, None, 4)
    assert max(reference["norms"]) > 0.5  # clipped
    for mine in four_ranks.run(train, many, stage, mesh, batch):
        assert mine["losses"] == pytest.approx(reference["losses"], abs=1e-5)
        assert mine["norms"] == pytest.approx(reference["norms"], rel=1e-4)
        assert mine["evaluation"] == pytest.approx(reference["evaluation"], abs=1e-5)
    assert largest_difference(weights(many), weights(one)) < 1e-6


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_that_was_cut_off_continues(four_ranks: Ranks, tmp_path: Path, stage: int) -> None:
    """DeepSpeed's checkpoints: momentum and partitioned weights come back, the schedule goes on."""
    folder, mesh = saved_model(tmp_path), {"cp_size": 2, "ulysses_degree": 2}
    whole = four_ranks.run(train, folder, stage, mesh, 2, save_strategy="steps", save_steps=2)
    expected = weights(folder)
    (tmp_path / "saved" / "model.safetensors").unlink()
    parts = four_ranks.run(train, folder, stage, mesh, 2, resume=f"{folder}/out/checkpoint-2")
    assert parts[0]["losses"][-2:] == pytest.approx(whole[0]["losses"][-2:], abs=1e-7)
    assert largest_difference(weights(folder), expected) < 1e-7


@pytest.mark.parametrize("stage", [2, 3])
def test_the_loss_in_chunks(four_ranks: Ranks, tmp_path: Path, stage: int) -> None:
    """Also where the weights of the head are partitioned, and tied to the embeddings, evaluation included."""
    one, many = (saved_model(tmp_path / n, tie_word_embeddings=stage == 3) for n in ("one", "many"))
    reference = train(one, None, None, 4)
    mesh = {"cp_size": 4, "ulysses_degree": 2, "loss_chunk_size": 7}
    for mine in four_ranks.run(train, many, stage, mesh, 4):
        assert mine["losses"] == pytest.approx(reference["losses"], abs=1e-5)
        assert mine["norms"] == pytest.approx(reference["norms"], rel=1e-4)
        assert mine["evaluation"] == pytest.approx(reference["evaluation"], abs=1e-5)
        assert mine["losses_of"] - {"Tensor"} == {"ChunkedLogits"}  # the self-check computes logits
    assert largest_difference(weights(many), weights(one)) < 1e-6


def with_replaced_linear() -> str:
    """ZeRO-3 was in this process; the present model is not partitioned. Then a head that is no linear one."""
    model = tiny_model("phi", "eager")
    torch.nn.init.normal_(model.lm_head.bias)
    whole = step(model, **batch_of("plain"))
    with cpu_deepspeed():
        from deepspeed.runtime.zero.linear import zero3_linear_wrap

        torch.nn.functional.linear = zero3_linear_wrap
        ChunkedLoss(model, 7)
        loss, gradients, output = step(model, **batch_of("plain"))
        assert output.logits is None
        assert loss == pytest.approx(whole[0], rel=1e-6)
        assert largest_difference(gradients, whole[1]) < 1e-6
        model.lm_head = torch.nn.Sequential(model.lm_head)
        with pytest.raises(hf_usp.UspModelError) as error:
            model(**batch_of("plain"))
        assert "forward" not in vars(model.lm_head[0])
        return str(error.value)


def test_a_process_in_which_linear_was_replaced(four_ranks: Ranks) -> None:
    for message in four_ranks.run(with_replaced_linear):
        assert "a vocabulary head of class Sequential where DeepSpeed's ZeRO-3 has replaced" in message


def own_loop(mesh: dict[str, Any] | None, precision: str = "no") -> dict[str, Any]:
    """Accelerate without the Trainer: `accumulate`, a plugin made from arguments, batch sizes from the dataloader."""
    with cpu_deepspeed() if mesh is not None else nullcontext():
        from accelerate import Accelerator, DeepSpeedPlugin

        fresh_accelerate()
        given: dict[str, Any] = {"cpu": True}
        if mesh is not None:
            plugin = DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=2, gradient_clipping=0.5)
            given = {"deepspeed_plugin": plugin, "parallelism_config": hf_usp.UspParallelismConfig(**mesh)}
            given["mixed_precision"] = precision
        accelerator = Accelerator(gradient_accumulation_steps=2, **given)
        model = tiny_model("llama", "eager" if mesh is None else "usp")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        share = 4 if mesh is None else 4 * mesh["cp_size"] // dist.get_world_size()
        data = [{name: torch.tensor(value) for name, value in row.items()} for row in rows(24, 33, False)]
        model, optimizer, loader = accelerator.prepare(
            model, optimizer, torch.utils.data.DataLoader(data, batch_size=share)
        )
        losses, norms = [], []
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch, use_cache=False).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
                optimizer.step()
                optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
        counted = None if mesh is None else model.train_batch_size()
        return {"losses": losses, "norms": norms, "weights": dict(model.state_dict()), "counted": counted}


def test_a_loop_with_accelerate(four_ranks: Ranks) -> None:
    reference = own_loop(None)
    for mine in four_ranks.run(own_loop, {"cp_size": 2, "ulysses_degree": 2}):
        assert mine["losses"] == pytest.approx(reference["losses"], abs=1e-5)
        assert mine["norms"] == pytest.approx(reference["norms"], rel=1e-4)
        names = {name.removeprefix("module."): value for name, value in mine["weights"].items()}
        assert largest_difference(names, reference["weights"]) < 2e-5
        assert mine["counted"] == 2 * 2 * 4  # DeepSpeed counts ranks; eight rows make a step


def test_bf16(four_ranks: Ranks) -> None:
    """Weights and gradients in bf16, fp32 masters: a factor that belongs to the mesh would show in the norms."""
    reference = own_loop(None)
    for mine in four_ranks.run(own_loop, {"cp_size": 4, "ulysses_degree": 2}, "bf16"):
        assert {p.dtype for p in mine["weights"].values()} == {torch.bfloat16}
        assert mine["losses"] == pytest.approx(reference["losses"], abs=2e-2)
        assert mine["norms"] == pytest.approx(reference["norms"], rel=2e-2)


WRONG = {
    "autotp_size=2": {"tensor_parallel": {"autotp_size": 2}},
    "sequence_parallel_size=2": {"sequence_parallel_size": 2, "data_parallel_size": 2},
    "train_batch_size=4": {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
    },
}


def refusal(found: str) -> str:
    with cpu_deepspeed():
        from accelerate import Accelerator, DeepSpeedPlugin

        plugin = DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": 2}} | WRONG[found])
        with pytest.raises(hf_usp.UspConfigError) as error:
            Accelerator(deepspeed_plugin=plugin, parallelism_config=hf_usp.UspParallelismConfig(cp_size=2))
        return str(error.value)


@pytest.mark.parametrize("found", WRONG)
def test_settings_that_do_not_fit_are_refused(four_ranks: Ranks, found: str) -> None:
    for message in four_ranks.run(refusal, found):
        assert found in message and "Remedy" in message


def test_the_true_number_of_rows_is_told() -> None:
    given = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    with pytest.raises(hf_usp.UspConfigError, match="the rows of an optimizer step are 2 x 2 x 2"):
        check_settings(given, 4, 2, 1)
    check_settings(given | {"train_batch_size": 16}, 4, 2, 1)
