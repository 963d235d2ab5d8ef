"""LoRA on weights of 8 and 4 bits (QLoRA) under the stock Trainer on a mesh: one process's losses, gradients, weights.

With the self-check: the short batch that it sends through the model in evaluation mode makes bitsandbytes pack 4-bit
weights anew on CPUs with bf16 instructions (AVX512-BF16), and gradients do not pass what it makes of them. On other
CPUs `tests/models/test_selfcheck.py` shows with layers of that kind that nothing of it stays.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ..ranks import Ranks
from ..tiny import tiny_model
from .adapters import compare, train_model

# PEFT 0.21 reads and calls names that Transformers 5.23 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
BITS: dict[str, dict[str, Any]] = {
    "8 bits": {"load_in_8bit": True},
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}
# Evaluation rounds activations, to int8 or (packed weights) to bf16: 1e-7 more may be one step more.
EVALUATION = 1e-4


def quantized(bits: str, base: str, attention: str, saved: str | None) -> Any:
    """The model in `base`, its weights quantized, with an adapter: the same random one everywhere, or a saved one."""
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(**BITS[bits]), attn_implementation=attention, dtype=torch.float32
    )
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    if saved is not None:
        return PeftModel.from_pretrained(model, saved, is_trainable=True)
    torch.manual_seed(5)
    return get_peft_model(
        model,
        LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )


def train(folder: str, mesh: tuple[int, int] | None, bits: str, base: str, saved: str | None = None) -> dict[str, Any]:
    model = quantized(bits, base, "sdpa" if mesh is None else "usp", saved)
    return train_model(model, folder, mesh)


@pytest.mark.parametrize("bits", BITS)
def test_adapters_on_quantized_weights_equal_one_process(two_ranks: Ranks, tmp_path: Path, bits: str) -> None:
    base, mesh = str(tmp_path / "base"), str(tmp_path / "mesh")
    # Packed weights come in 32 rows and blocks of 64 columns.
    tiny_model("llama", "sdpa", hidden_size=64, intermediate_size=128).save_pretrained(base)
    reference = train(str(tmp_path / "one"), None, bits, base)
    for degrees in ((2, 1), (2, 2)):
        for mine in two_ranks.run(train, mesh, degrees, bits, base):
            compare(mine, reference, EVALUATION)
    # The mesh's checkpoint is continued on the mesh and in one process.
    reference = train(str(tmp_path / "again"), None, bits, base, mesh)
    for mine in two_ranks.run(train, str(tmp_path / "on"), (2, 1), bits, base, mesh):
        compare(mine, reference, EVALUATION)
