"""A run that is cut off continues on the same rows: bitwise on its own mesh, to rounding on any other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import hf_usp
from hf_usp.callbacks import checkpoint

from ..harness import fresh_accelerate, training_arguments
from ..ranks import RankError, Ranks
from ..tiny import largest_difference, rows, tiny_model

STEPS, SAVED = 6, 3
MESH = (4, 2)  # cp_size and ulysses degree of the run that is cut off; the rest of four ranks is data parallel
Mesh = tuple[int, int] | None


def train(folder: str, mesh: Mesh, resume: str | None, setup: dict[str, Any]) -> dict[str, Any]:
    """The stock Trainer for six steps, saving every third; in one process when `mesh` is None."""
    from transformers import Trainer

    fresh_accelerate()
    config = None if mesh is None else hf_usp.UspParallelismConfig(*mesh, **setup.get("options", {}))
    model = tiny_model(setup["family"], "sdpa" if config is None else "usp", **setup["changes"])
    seen: list[list[int]] = []
    model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"][:, 0].tolist()), with_kwargs=True)
    args = training_arguments(
        folder,
        seed=11,
        parallelism_config=config,
        per_device_train_batch_size=2 if mesh is None else 2 * mesh[0] // 4,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        save_steps=SAVED,
        logging_steps=1,
        learning_rate=0.01,
        lr_scheduler_type="cosine",
    )
    # 14 rows, 2 x 2 a step: the run is cut off inside the first epoch and goes on into the second, in another order.
    trainer = Trainer(model=model, args=args, train_dataset=rows(14, 41))
    if setup.get("dies"):
        trainer.add_callback(dies_in_the_second_save())
    trainer.train(resume_from_checkpoint=resume)
    optimizer = trainer.optimizer.state_dict()["state"]
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "seen": seen,
        "weights": {name: p.detach().clone() for name, p in model.state_dict().items()},
        "optimizer": {f"{i} {name}": v.clone() for i, state in optimizer.items() for name, v in state.items()},
    }


def dies_in_the_second_save() -> Any:
    """A callback whose state is asked for after weights and optimizer are written, before `trainer_state.json` is."""
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    class Dies(TrainerCallback, ExportableState):
        saves = 0

        def state(self) -> dict[str, Any]:
            self.saves += 1
            if self.saves > 2:  # it is asked once when the run starts
                os._exit(9)
            return {"args": {}, "attributes": {}}

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == STEPS:  # the processes that write no state
                os._exit(9)

    return Dies()


LLAMA: dict[str, Any] = {"family": "llama", "changes": {}}
# With dropout the run depends on the random state of every rank.
DROPOUT: dict[str, Any] = {"family": "phi", "changes": {"resid_pdrop": 0.1}}
# Layers in chunks keep their input alone, and attention's output of the last layer.
CHUNKS: dict[str, Any] = LLAMA | {"options": {"layer_chunk_size": 4, "head_groups": 2, "keep_attention": 1}}


@pytest.mark.parametrize("setup", [LLAMA, DROPOUT, CHUNKS], ids=["llama", "phi", "layers in chunks"])
def test_bitwise_on_the_same_mesh(four_ranks: Ranks, tmp_path: Path, setup: dict[str, Any]) -> None:
    whole = four_ranks.run(train, str(tmp_path / "a"), MESH, None, setup)
    resumed = four_ranks.run(train, str(tmp_path / "b"), MESH, str(tmp_path / "a" / f"checkpoint-{SAVED}"), setup)
    for before, after in zip(whole, resumed, strict=True):
        assert after["seen"] == before["seen"][-len(after["seen"]) :]
        assert after["losses"] == before["losses"]
        for part in ("weights", "optimizer"):
            assert largest_difference(after[part], before[part]) == 0


# From a run on cp 4 (ulysses 2 x ring 2) to a pure ring, a pure ulysses with data parallelism, one process; and back.
OTHERS = [(MESH, (4, 1)), (MESH, (2, 2)), (MESH, None), (None, MESH)]


@pytest.mark.parametrize(("before", "after"), OTHERS, ids=str)
def test_on_another_mesh_to_rounding(four_ranks: Ranks, tmp_path: Path, before: Mesh, after: Mesh) -> None:
    whole = _run(four_ranks, str(tmp_path / "a"), before, None)
    checkpoint = str(tmp_path / "a" / f"checkpoint-{SAVED}")
    resumed = _run(four_ranks, str(tmp_path / "b"), after, checkpoint)
    assert _rows_seen(resumed, after) == _rows_seen(whole, before)[-len(_rows_seen(resumed, after)) :]
    for other in resumed:
        assert other["losses"][:SAVED] == whole[0]["losses"][:SAVED]
        assert other["losses"] == pytest.approx(whole[0]["losses"], abs=1e-5)
        for part in ("weights", "optimizer"):
            assert largest_difference(other[part], whole[0][part]) < 2e-5


def _run(ranks: Ranks, folder: str, mesh: Mesh, resume: str | None) -> list[dict[str, Any]]:
    return [train(folder, None, resume, LLAMA)] if mesh is None else ranks.run(train, folder, mesh, resume, LLAMA)


def _rows_seen(results: list[dict[str, Any]], mesh: Mesh) -> list[list[int]]:
    """First tokens of the rows of every global batch; data-parallel ranks hold parts of it."""
    parts = [result["seen"] for result in results[:: 1 if mesh is None else mesh[0]]]
    return [sum(batch, []) for batch in zip(*parts, strict=True)]


def killed_while_saving(folder: str) -> None:
    """Every process dies in the second save, after weights and optimizer, before the state of the Trainer."""
    train(folder, MESH, None, {**LLAMA, "dies": True})


def test_a_killed_run_leaves_the_last_complete_checkpoint(four_ranks: Ranks, tmp_path: Path) -> None:
    whole = four_ranks.run(train, str(tmp_path / "whole"), MESH, None, LLAMA)
    killed = tmp_path / "killed"
    with pytest.raises(RankError, match="died"):
        four_ranks.run(killed_while_saving, str(killed))
    assert (killed / f"checkpoint-{STEPS}" / "model.safetensors").exists()
    assert checkpoint.get_last_complete_checkpoint(killed) == str(killed / f"checkpoint-{SAVED}")
    with pytest.raises(hf_usp.UspConfigError, match=f"no trainer_state.json.*continue from .*checkpoint-{SAVED}"):
        checkpoint.check_checkpoint_complete(killed / f"checkpoint-{STEPS}")
    for before, after in zip(
        whole,
        four_ranks.run(train, str(killed), MESH, checkpoint.get_last_complete_checkpoint(killed), LLAMA),
        strict=True,
    ):
        assert largest_difference(after["weights"], before["weights"]) == 0
    assert checkpoint.get_last_complete_checkpoint(killed) == str(killed / f"checkpoint-{STEPS}")


def test_what_counts_as_complete(tmp_path: Path) -> None:
    assert checkpoint.get_last_complete_checkpoint(tmp_path) is None
    for step, state in ((2, '{"global_step": 2}'), (10, '{"global_step": 1'), (9, '{"global_step": 8}')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / checkpoint.STATE).write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoint.get_last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    for name, message in (("10", "cut off"), ("9", "is of step 8"), ("11", "no such folder")):
        with pytest.raises(hf_usp.UspConfigError, match=message):
            checkpoint.check_checkpoint_complete(tmp_path / f"checkpoint-{name}")
