"""TRL's trainers on a mesh: losses, gradient norms, weights and their own metrics equal one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hf_usp

from ..harness import fresh_accelerate
from ..ranks import Ranks
from ..tiny import largest_difference, tiny_model

# TRL 1.16 (whose default is gradient checkpointing) uses names that Transformers 5.23 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing")
Mesh = tuple[int, int] | None
WORDS = [f"w{i}" for i in range(58)]
# Assistant turns lie between {% generation %} tags, from which TRL takes the mask of `assistant_only_loss`.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + ' <eos> ' }}"
    "{% endgeneration %}{% else %}{{ 'w0 ' + m['content'] + ' w1 ' }}{% endif %}{% endfor %}"
)
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


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<bos>", "<eos>", "<unk>", *WORDS]
    model = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    made.chat_template = TEMPLATE
    return made


def words(count: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator).tolist())


def dataset(kind: str, count: int = 24) -> Any:
    from datasets import Dataset

    lengths = [5 + 7 * i % 19 for i in range(count)]
    if kind == "text":
        rows: list[dict[str, Any]] = [{"text": words(n, i)} for i, n in enumerate(lengths)]
    elif kind == "completion":
        rows = [{"prompt": words(4, i), "completion": " " + words(n, 100 + i)} for i, n in enumerate(lengths)]
    elif kind == "preference":
        rows = [
            {"prompt": words(4, i), "chosen": " " + words(n, 100 + i), "rejected": " " + words(9, 200 + i)}
            for i, n in enumerate(lengths)
        ]
    else:
        turns = [("user", 3), ("assistant", 6), ("user", 2), ("assistant", 4)]
        rows = [
            {"messages": [{"role": role, "content": words(n + i % 5, 7 * i + n)} for role, n in turns]}
            for i in range(count)
        ]
    return Dataset.from_list(rows)


def config_for(mesh: Mesh) -> Any:

    fresh_accelerate()
    return None if mesh is None else hf_usp.UspParallelismConfig(cp_size=mesh[0], ulysses_degree=mesh[1])


def common(folder: str, mesh: Mesh, config: Any) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "parallelism_config": config,
        "per_device_train_batch_size": 2 if mesh is None else 2 * mesh[0] // 4,
        "per_device_eval_batch_size": 2,
        "max_steps": 3,
        "gradient_accumulation_steps": 2,
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "bf16": False,
    }


def finished(trainer: Any, model: Any) -> dict[str, Any]:
    trainer.train()
    evaluation = trainer.evaluate()
    skipped = ("runtime", "per_second", "epoch")
    logs = [*(h for h in trainer.state.log_history if "loss" in h), evaluation]
    return {
        "logs": [{k: v for k, v in log.items() if not any(s in k for s in skipped)} for log in logs],
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
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


# TRL averages ratios over the batches of an evaluation; two data-parallel ranks make one batch of two.
OF_A_BATCH = ("accuracy", "accuracies", "logits/chosen", "logits/rejected")


def compare(mine: dict[str, Any], reference: dict[str, Any], mesh: tuple[int, int]) -> None:
    assert len(mine["logs"]) == len(reference["logs"]) == 4
    for here, there in zip(mine["logs"], reference["logs"], strict=True):
        assert here.keys() == there.keys()
        names = [n for n in there if mesh[0] == 4 or not n.startswith("eval_") or not n.endswith(OF_A_BATCH)]
        assert {n: here[n] for n in names} == pytest.approx({n: there[n] for n in names}, rel=2e-5, abs=2e-6)
    assert largest_difference(mine["weights"], reference["weights"]) < 1e-6


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


def refused() -> str:
    from accelerate import Accelerator
    from trl.trainer.utils import add_fused_lm_head

    from ..tiny import batch_of

    model = Accelerator(cpu=True, parallelism_config=config_for((4, 2))).prepare(tiny_model())
    inner = model.module
    add_fused_lm_head(inner, outputs=("log_probs", "entropy"))
    inner.add_model_tags(["trl", "grpo"])
    batch = batch_of("plain")
    with torch.no_grad():
        fields = model(**batch, fused_lm_head=True)
        alone = tiny_model(attention="sdpa")
        add_fused_lm_head(alone, outputs=("log_probs", "entropy"))
        whole = alone(**batch, fused_lm_head=True)
    for name in ("log_probs", "entropy", "label_mask"):
        torch.testing.assert_close(fields[name], whole[name], atol=1e-5, rtol=1e-5)
    with pytest.raises(hf_usp.UspModelError) as refusal:
        model(**batch, fused_lm_head=True)
    return str(refusal.value)


def test_other_trainers_get_whole_fields_without_gradients_only(four_ranks: Ranks) -> None:
    for message in four_ranks.run(refused):
        assert "['trl', 'grpo']" in message
        assert "SFTTrainer and DPOTrainer" in message
