"""Image-text models beyond Qwen's, on batches with an image in each row: exact, or refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_usp

from ..ranks import Ranks
from ..tiny import SIZES
from .verdict import Step, attach_to, gradients_of

IMAGE = 62  # stands for an image's features: four tokens of it
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
CLIP = {"model_type": "clip_vision_model", "projection_dim": 32, **TOWER}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **TOWER}
TEXT = {**SIZES, "use_cache": False}
# Family -> configuration, and what its text model is.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llava": (
        {"vision_config": CLIP, "image_token_index": IMAGE, "vision_feature_layer": -1, "image_seq_length": 4},
        {"model_type": "llama"},
    ),
    "mistral3": (
        {
            "vision_config": {"model_type": "pixtral", **TOWER, "head_dim": 16},
            "image_token_index": IMAGE,
            "vision_feature_layer": -1,
            "spatial_merge_size": 1,
        },
        {"model_type": "mistral"},
    ),
    "internvl": (
        {
            "vision_config": {**TOWER, "image_size": [8, 8], "patch_size": [2, 2]},
            "image_token_id": IMAGE,
            "image_seq_length": 4,
        },
        {"model_type": "qwen2"},
    ),
    "glm4v": (
        {
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "num_heads": 2,
                "intermediate_size": 48,
                "patch_size": 2,
                "temporal_patch_size": 1,
                "spatial_merge_size": 2,
                "in_channels": 3,
                "out_hidden_size": 32,
                "image_size": 16,
            },
            "image_token_id": IMAGE,
            "video_token_id": 61,
            "image_start_token_id": 59,
            "image_end_token_id": 58,
            "video_start_token_id": 57,
            "video_end_token_id": 56,
        },
        {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    ),
    "gemma3": (
        {"vision_config": SIGLIP, "image_token_id": IMAGE, "mm_tokens_per_image": 4},
        {"model_type": "gemma3_text", "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "paligemma": (
        {"vision_config": SIGLIP, "image_token_id": IMAGE, "projection_dim": 32, "hidden_size": 32},
        {"model_type": "gemma", "head_dim": 8},
    ),
}


def image_model(family: str, attention: str) -> Any:
    """A tiny random model, the same weights in every process."""
    import transformers

    changes, text = FAMILIES[family]
    config = transformers.AutoConfig.for_model(family, text_config={**TEXT, **text}, **changes)
    torch.manual_seed(0)
    return transformers.AutoModelForImageTextToText.from_config(config, attn_implementation=attention).eval()


def image_batch(family: str) -> dict[str, Any]:
    """Two rows of 23 tokens; four of each are an image of 8 x 8 pixels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 50, (2, 23), generator=generator)
    ids[:, 5:9] = IMAGE
    batch: dict[str, Any] = {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    if family == "glm4v":
        ids[:, 4], ids[:, 9] = 59, 58
        batch = {"pixel_values": torch.randn(32, 12, generator=generator), "mm_token_type_ids": (ids == IMAGE).long()}
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
    elif family == "mistral3":
        batch["image_sizes"] = torch.tensor([[8, 8]] * 2)
    elif family in ("gemma3", "paligemma"):
        batch["token_type_ids"] = (ids == IMAGE).long()
    labels = ids.masked_fill(ids == IMAGE, -100)
    mask = torch.ones_like(ids)
    mask[0, -3:], labels[0, -3:] = 0, -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, **batch}


def step(model: Any, batch: dict[str, Any]) -> Step:
    out = model(**batch)
    out.loss.backward()
    seen = batch["attention_mask"].bool()
    return Step(out.loss.detach(), out.logits.detach()[seen], gradients_of(model))


def outcome(family: str) -> float | str:
    """The largest relative error of a sharded step on 2 x 2 ranks, or the refusal."""
    batch = image_batch(family)
    expected = step(image_model(family, "eager"), batch)
    model = image_model(family, "usp")
    attach_to(model, (2, 2), True)
    try:
        got = step(model, batch)
    except hf_usp.UspError as refusal:
        return str(refusal)
    got.average_gradients()
    return expected.largest_error(got)


@pytest.mark.parametrize("family", ["llava", "mistral3", "internvl", "glm4v"])
def test_images_are_exact(four_ranks: Ranks, family: str) -> None:
    assert max(four_ranks.run(outcome, family)) < 1e-5


@pytest.mark.parametrize(
    ("family", "words"),
    [("gemma3", "a mask made of or_masks"), ("paligemma", "the model reads `ndim` of its attention")],
)
def test_images_that_see_each_other_both_ways_are_refused(four_ranks: Ranks, family: str, words: str) -> None:
    for message in four_ranks.run(outcome, family):
        assert words in message


def test_the_image_matters() -> None:
    batch = image_batch("llava")
    model = image_model("llava", "eager")
    assert model(**batch).loss != model(**{**batch, "pixel_values": -batch["pixel_values"]}).loss
