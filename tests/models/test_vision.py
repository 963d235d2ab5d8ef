"""Qwen's vision-language models on text and images: loss, logits and every gradient equal the eager single process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hf_usp
from hf_usp.models.hooks import get_hooks

from ..harness import fresh_accelerate, prepare, step_errors, training_arguments
from ..ranks import Ranks
from ..tiny import SIZES, batch_of, largest_difference

IMAGE, VIDEO = 60, 61  # token ids that stand for visual features
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 48,
    "patch_size": 2,
    "temporal_patch_size": 1,
    "spatial_merge_size": 2,
    "in_channels": 3,
    "out_hidden_size": 32,
}
# Family -> what differs in its vision tower and its text model.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": (
        {"embed_dim": 32, "mlp_ratio": 2},
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen2_5_vl": ({"window_size": 8, "fullatt_block_indexes": [1]}, {}),
    "qwen3_vl": ({"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}, {"head_dim": 8}),
    "qwen3_5": (
        {"num_position_embeddings": 16},
        {
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
}
# Rows of a batch as runs of (kind of token, how many or which grid of patches: time, height, width).
ROWS: list[list[tuple[str, Any]]] = [
    [("text", 5), ("image", (1, 4, 6)), ("text", 7), ("image", (1, 4, 4)), ("text", 9)],
    [("text", 3), ("video", (2, 4, 4)), ("text", 17), ("image", (1, 2, 4)), ("text", 1)],
]


def vision_model(family: str, attention: str) -> Any:
    """A tiny random model, the same weights in every process."""
    import transformers

    vision, text = FAMILIES[family]
    config = transformers.AutoConfig.for_model(
        family,
        vision_config={**VISION, **vision},
        text_config={**SIZES, "use_cache": False, "rope_parameters": dict(ROPE), **text},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForImageTextToText.from_config(config, attn_implementation=attention)


def vision_batch(family: str, kind: str) -> dict[str, Any]:
    """Two rows with images of different sizes and a video, padded where the kind says so."""
    if kind == "text":
        return batch_of("right")
    generator = torch.Generator().manual_seed(11)
    ids, types, grids = [], [], {"image": [], "video": []}
    for row in ROWS:
        tokens: list[int] = []
        for what, size in row:
            if what == "text":
                tokens += torch.randint(3, IMAGE, (size,), generator=generator).tolist()
            else:
                frame = [IMAGE if what == "image" else VIDEO] * (size[1] * size[2] // VISION["spatial_merge_size"] ** 2)
                # From Qwen3-VL on there is a time stamp between the frames of a video.
                stamp = [7] if family in ("qwen3_vl", "qwen3_5") else []
                tokens += (frame + stamp) * (size[0] - 1) + frame
                grids[what].append(size)
        ids.append(tokens)
        types.append([{IMAGE: 1, VIDEO: 2}.get(token, 0) for token in tokens])
    length = max(map(len, ids))
    batch: dict[str, Any] = {"input_ids": [], "attention_mask": [], "mm_token_type_ids": [], "labels": []}
    for tokens, kinds in zip(ids, types, strict=True):
        pad = [0] * (length - len(tokens))
        visible = [1] * len(tokens)
        left = pad if kind == "left" else []
        right = pad if kind != "left" else []
        labels = [-100 if t >= IMAGE else t for t in tokens]
        labels[0] = -100
        batch["input_ids"].append(left + tokens + right)
        batch["attention_mask"].append(left + visible + right)
        batch["mm_token_type_ids"].append(left + kinds + right)
        batch["labels"].append([-100] * len(left) + labels + [-100] * len(right))
    batch = {name: torch.tensor(value) for name, value in batch.items()}
    if kind in ("plain", "packed"):
        del batch["attention_mask"]
    for what, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        grid = torch.tensor(grids[what])
        width = VISION["in_channels"] * VISION["patch_size"] ** 2
        batch[pixels] = torch.randn(int(grid.prod(1).sum()), width, generator=generator)
        batch[f"{what}_grid_thw"] = grid
    if kind == "packed":
        # Documents of 4, 20 and the remaining tokens; positions in the text come before those in time, height, width.
        text = torch.cat([torch.arange(n) for n in (4, 20, length - 24)]).expand(len(ROWS), -1)
        grid_positions = torch.stack([text, text // 2 + 1, text % 5])
        batch["position_ids"] = torch.cat([text[None], grid_positions])
    return batch


def vision_errors(family: str, kind: str, ring: int, ulysses: int) -> dict[str, float]:
    model = prepare(vision_model(family, "usp").train(), ring, ulysses)
    return step_errors(model, vision_model(family, "eager").train(), vision_batch(family, kind))


CASES = [(family, kind) for family in FAMILIES for kind in ("plain", "right", "left", "packed", "text")]


@pytest.mark.parametrize(("family", "kind"), [case for case in CASES if case != ("qwen3_5", "packed")])
def test_images_equal_eager(four_ranks: Ranks, family: str, kind: str) -> None:
    for errors in four_ranks.run(vision_errors, family, kind, 2, 2):
        assert max(errors.values()) < 1e-4, {name: e for name, e in errors.items() if not e < 1e-4}


@pytest.mark.parametrize("degrees", [(4, 1), (1, 4)], ids=str)
def test_images_on_other_meshes(four_ranks: Ranks, degrees: tuple[int, int]) -> None:
    for errors in four_ranks.run(vision_errors, "qwen3_vl", "left", *degrees):
        assert max(errors.values()) < 1e-4, {name: e for name, e in errors.items() if not e < 1e-4}


def packed_verdict(family: str, rows: int) -> str:
    """The outputs of a prepared model for documents told apart by one or four rows of positions."""
    model = prepare(vision_model(family, "usp"), 2, 2)
    batch = batch_of("packed") if rows == 1 else vision_batch(family, "packed")
    try:
        errors = step_errors(model, vision_model(family, "eager"), batch)
    except hf_usp.UspModelError as error:
        return str(error)
    return f"exact: {max(errors.values()) < 1e-4}"


def test_packed_documents_are_what_one_process_makes_of_them(four_ranks: Ranks) -> None:
    """Qwen2-VL tells documents apart by four rows of positions only, recurrent layers by none."""
    assert four_ranks.run(packed_verdict, "qwen3_vl", 1) == ["exact: True"] * 4
    for family, rows in (("qwen2_vl", 1), ("qwen3_5", 1), ("qwen3_5", 4)):
        assert all("packed documents" in message for message in four_ranks.run(packed_verdict, family, rows))


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return vision_batch("qwen2_5_vl", rows[0]["kind"])


def train(folder: str, sharded: bool) -> dict[str, Any]:
    """Train, evaluate and generate with the stock Trainer."""
    from transformers import Trainer

    fresh_accelerate()
    model = vision_model("qwen2_5_vl", "usp" if sharded else "eager")
    config = hf_usp.UspParallelismConfig(cp_size=4, ulysses_degree=2, generate="sharded") if sharded else None
    args = training_arguments(
        folder,
        save_strategy="no",
        optim="sgd",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        logging_steps=1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        remove_unused_columns=False,
        parallelism_config=config,
        train_sampling_strategy="sequential",
        prediction_loss_only=True,
    )
    # The kind of the first of two rows is that of the batch: images with and without padding, text alone.
    rows = [{"kind": kind} for kind in ("left", "", "plain", "", "text", "", "right", "")]
    trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows[:2], data_collator=collate)
    trainer.train()
    prompt = vision_batch("qwen2_5_vl", "left")
    del prompt["labels"]
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    generated = model.eval().generate(**prompt, **settings).flatten().tolist()
    hooks = get_hooks(model)
    if hooks is not None:
        hooks.generation.way = "whole"
    return {
        "losses": [h["loss"] for h in trainer.state.log_history if "loss" in h],
        "norms": [h["grad_norm"] for h in trainer.state.log_history if "grad_norm" in h],
        "evaluation": [trainer.evaluate()["eval_loss"]],
        "generated": [generated, model.generate(**prompt, **settings).flatten().tolist()],
        "weights": {name: p.detach().clone() for name, p in model.state_dict().items()},
    }


def test_the_stock_trainer_follows_one_process(four_ranks: Ranks, tmp_path: Path) -> None:
    expected = train(str(tmp_path), False)
    for mine in four_ranks.run(train, str(tmp_path), True):
        for name in ("losses", "norms", "evaluation"):
            assert mine[name] == pytest.approx(expected[name], rel=1e-4), name
        assert largest_difference(mine["weights"], expected["weights"]) < 1e-5
        assert mine["generated"] == expected["generated"]
