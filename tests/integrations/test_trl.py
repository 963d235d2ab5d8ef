"""TRL's trainers on a mesh: losses, gradient norms, weights and their own metrics equal one process."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from ..ranks import Ranks
from ..tiny import largest_difference, tiny_model
from .trl_runs import Mesh, common, compare, config_for, dataset, finished, tokenizer

# TRL 1.16 (whose default is gradient checkpointing) uses names that Transformers 5.23 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing")
SFT: dict[str, dict[str, Any]] = {
    "padded": {"data": "text"},
    "packed": {
        "data": "text",
        "packing": True,
        "max_length": 33,
        "gradient_checkpointing_kwargs": {"selective": True},
    },
    "completion only, dft": {"data": "completion", "loss_type": "dft"},
    "assistant only": {"data": "chat", "assistant_only_loss": True, "padding_free": True, "max_length": None},
}


def sft(folder: str, mesh: Mesh, case: str, eval_rows: int) -> dict[str, Any]:
    from trl import SFTConfig, SFTTrainer

    config = config_for(mesh)
    settings = dict(SFT[case])
    data = settings.pop("data")
    model = tiny_model("qwen2", "sdpa" if mesh is None else "usp")
    args = SFTConfig(**common(folder, mesh, config), **settings)
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=dataset(data),
        eval_dataset=dataset(data, eval_rows),
        processing_class=tokenizer(),
    )
    return finished(trainer, model)


@pytest.mark.parametrize(("case", "mesh"), [(case, (2, 2) if case == "padded" else (4, 2)) for case in SFT])
def test_sft_equals_one_process(four_ranks: Ranks, tmp_path: Path, case: str, mesh: tuple[int, int]) -> None:
    # The last batch of an evaluation is ragged, except where data-parallel ranks share the batches.
    eval_rows = 5 if mesh[0] == 4 else 4
    reference = sft(str(tmp_path), None, case, eval_rows)
    for log in reference["logs"][:3]:
        assert {"entropy", "mean_token_accuracy", "num_tokens", "loss", "grad_norm"} <= log.keys()
    for mine in four_ranks.run(sft, str(tmp_path), mesh, case, eval_rows):
        compare(mine, reference, mesh)


def dpo(folder: str, mesh: Mesh, loss_type: str) -> dict[str, Any]:
    """The reference model is the trained one without its adapter, or (`ipo`) another model."""
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    config = config_for(mesh)
    attention = "sdpa" if mesh is None else "usp"
    model = tiny_model("llama", attention)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    settings = {"max_length": 40, "loss_type": loss_type, "beta": 0.5, **common(folder, mesh, config)}
    other = tiny_model("llama", attention, initializer_range=0.03)
    torch.manual_seed(3)  # of the adapter's factors
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**settings),
        train_dataset=dataset("preference"),
        eval_dataset=dataset("preference", 4),
        processing_class=tokenizer(),
        **({"ref_model": other} if loss_type == "ipo" else {"peft_config": adapter}),
    )
    return finished(trainer, trainer.model)


@pytest.mark.parametrize(("loss_type", "mesh"), [("sigmoid", (4, 2)), ("ipo", (2, 2))])
def test_dpo_equals_one_process(four_ranks: Ranks, tmp_path: Path, loss_type: str, mesh: tuple[int, int]) -> None:
    reference = dpo(str(tmp_path), None, loss_type)
    assert reference["logs"][2]["rewards/margins"] != 0
    for mine in four_ranks.run(dpo, str(tmp_path), mesh, loss_type):
        compare(mine, reference, mesh)


def precomputed(folder: str, mesh: Mesh, kind: str) -> dict[str, Any]:
    """Log-probabilities of the reference that TRL computes before it prepares the model, and three steps with them."""
    import datasets
    import trl

    config = config_for(mesh)
    model, tokens = tiny_model("llama", "sdpa" if mesh is None else "usp"), []
    model.model.layers[0].register_forward_pre_hook(lambda layer, args: tokens.append(args[0].shape[1]))
    data: Any = datasets.load_from_disk(f"{folder}/data")  # where TRL keeps what it computes
    made: Any = trl
    arguments = {"max_length": 40, "precompute_ref_log_probs": True, **common(folder, mesh, config)}
    trainer = getattr(made, f"{kind}Trainer")(
        model=model,
        args=getattr(made, f"{kind}Config")(**arguments),
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        processing_class=tokenizer(),
    )
    before = list(tokens)
    found = finished(trainer, model)
    found["logs"][0].pop("rewards/accuracies", None)  # all rewards are 0 then, but for rounding
    return found | {"tokens": before}


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_references_computed_beforehand_are_sharded(four_ranks: Ranks, tmp_path: Path, kind: str) -> None:
    data = dataset("preference" if kind == "DPO" else "completion")
    if kind == "KTO":
        data = data.map(lambda row, i: {"label": bool(i % 3)}, with_indices=True)
    folders = [str(tmp_path / name) for name in ("one", "many")]
    for folder in folders:
        data.save_to_disk(f"{folder}/data")
    reference = precomputed(folders[0], None, kind)
    for mine in four_ranks.run(precomputed, folders[1], (4, 2), kind):
        compare(mine, reference, (4, 2))
        assert max(mine["tokens"]) <= max(reference["tokens"]) / 4 + 2 < 10 < min(reference["tokens"])


def sft_counts(folder: str, mesh: Mesh) -> list[dict[str, float]]:
    """Counts of SFT over cp 2 x tp 2, or in one process."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig
    from trl import SFTConfig, SFTTrainer

    config = config_for(mesh)
    sizes: dict[str, Any] = {"distributed_config": DistributedConfig(tp_size=2, fsdp_size=2)} if mesh else {}
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # embeddings that Transformers hands on as a view
    args = SFTConfig(**common(folder, mesh, config) | {"per_device_train_batch_size": 2, "max_steps": 2})
    attention = "sdpa" if mesh is None else "usp"
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", attn_implementation=attention, **sizes)
    trainer = SFTTrainer(model=model, args=args, train_dataset=dataset("text"), processing_class=tokenizer())
    trainer.train()
    return [{name: h[name] for name in ("loss", "num_tokens")} for h in trainer.state.log_history if "loss" in h]


def test_tokens_are_counted_once_over_tensor_parallel_ranks(four_ranks: Ranks, tmp_path: Path) -> None:
    tiny_model("llama", "eager").save_pretrained(tmp_path / "model")
    reference = sft_counts(str(tmp_path), None)
    for mine in four_ranks.run(sft_counts, str(tmp_path), (2, 1)):
        assert mine == [pytest.approx(log, rel=2e-5) for log in reference]


def reward(folder: str, mesh: Mesh) -> dict[str, Any]:
    from transformers import AutoConfig, AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    from ..tiny import FAMILIES, SIZES

    config = config_for(mesh)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("qwen2", num_labels=1, **{**SIZES, **FAMILIES["qwen2"]}),
        attn_implementation="sdpa" if mesh is None else "usp",
    )
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(max_length=40, center_rewards_coefficient=0.1, **common(folder, mesh, config)),
        train_dataset=dataset("preference"),
        eval_dataset=dataset("preference", 4),
        processing_class=tokenizer(),
    )
    return finished(trainer, model)


def test_rewards_equal_one_process(four_ranks: Ranks, tmp_path: Path) -> None:
    reference = reward(str(tmp_path), None)
    for mine in four_ranks.run(reward, str(tmp_path), (4, 2)):
        compare(mine, reference, (4, 2))


def fields(sharded: bool) -> dict[str, torch.Tensor]:
    """Fields of a fused head, and the gradients of a loss of two of them, averaged over ranks."""
    from accelerate import Accelerator
    from trl.trainer.utils import add_fused_lm_head

    from ..tiny import batch_of

    model = tiny_model(attention="usp" if sharded else "sdpa")
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    config = config_for((4, 2) if sharded else None)
    wrapped = Accelerator(cpu=True, parallelism_config=config).prepare(model) if sharded else model
    output = wrapped(**batch_of("left"), fused_lm_head=True)
    (output.log_probs.exp().sum() + 2 * output.entropy.square().sum()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients | {name: output[name].detach() for name in ("log_probs", "entropy", "is_top1", "label_mask")}


def test_fields_of_the_fused_head_keep_their_gradients(four_ranks: Ranks) -> None:
    reference = fields(False)
    for mine in four_ranks.run(fields, True):
        assert largest_difference(mine, reference) < 2e-5
