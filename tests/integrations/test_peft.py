"""PEFT adapters under the stock Trainer on a mesh: one process's losses, gradients and weights; saved, loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_usp.memory.tiled_layer import tiled_layer

from ..ranks import Ranks
from ..tiny import tiny_model
from .adapters import compare, train_model

# PEFT 0.21 reads a name that Transformers 5.23 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
MESH = (4, 2)
IN_CHUNKS = {"layer_chunk_size": 4, "head_groups": 2, "keep_attention": 1}
# init_lora_weights=False: both factors random, so that every adapter weight has a gradient from the first step on.
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "dora, head trained": {"r": 2, "target_modules": "all-linear", "use_dora": True, "modules_to_save": ["lm_head"]},
}


def adapted(adapter: str, attention: str, saved: str | None = None) -> Any:
    """A tiny model with an adapter: the same random one in every process, or a saved one."""
    from peft import LoraConfig, PeftModel, get_peft_model

    # DoRA with random factors triples rounding errors every step: in fp32 that is 2e-5 of the loss after four.
    model = tiny_model("qwen2", attention, torch.float64)
    if saved is not None:
        return PeftModel.from_pretrained(model, saved, is_trainable=True)
    torch.manual_seed(5)
    settings = {"lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM", **ADAPTERS[adapter]}
    return get_peft_model(model, LoraConfig(**settings))


def train(
    folder: str,
    mesh: tuple[int, int] | None,
    adapter: str,
    saved: str | None = None,
    checkpointing: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """`train_model` of a tiny model with an adapter."""
    model = adapted(adapter, "sdpa" if mesh is None else "usp", saved)
    found = train_model(model, folder, mesh, checkpointing, **options)
    return found | {"verdicts": [set(layer.verdicts.values()) for layer in map(tiled_layer, model.modules()) if layer]}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_equal_one_process(four_ranks: Ranks, tmp_path: Path, adapter: str) -> None:
    one, mesh = str(tmp_path / "one"), str(tmp_path / "mesh")
    reference = train(one, None, adapter)
    for mine in four_ranks.run(train, mesh, MESH, adapter, None, True):
        compare(mine, reference)
    assert (tmp_path / "mesh" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "mesh" / "model.safetensors").exists()
    # The mesh's checkpoint is continued in one process, and on the mesh with layers in chunks.
    reference = train(str(tmp_path / "again"), None, adapter, mesh)
    for mine in four_ranks.run(train, str(tmp_path / "on"), MESH, adapter, mesh, **IN_CHUNKS):
        compare(mine, reference)
        assert mine["verdicts"] and set.union(*mine["verdicts"]) == {None}, "layers have been computed in chunks"


def test_modules_that_do_not_exist_are_named() -> None:
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match=r"Target modules.*W_pack.*not found in the base model"):
        get_peft_model(tiny_model(), LoraConfig(target_modules=["W_pack"]))
