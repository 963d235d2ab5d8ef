"""A checkpoint that lacks something, or that was damaged, is not continued; an older one is."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from transformers import Trainer

import hf_usp
from hf_usp.callbacks import checkpoint

from ..ranks import RankError, Ranks
from .training import train

SAVED = ["checkpoint-2", "checkpoint-4"]


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def never_on_the_disk(path: Path) -> None:
    """Blocks that were not written when the machine went down."""
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2] + b"\0" * (size - size // 2))


def another_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


DAMAGES: dict[Callable[[Path], None], str] = {
    Path.unlink: "is missing",
    cut_in_half: "has .* bytes of|is damaged",
    never_on_the_disk: "is damaged",
    another_byte: "is damaged",
}


def test_every_damage_is_noticed(two_ranks: Ranks, tmp_path: Path) -> None:
    """All but bytes inside weights that changed in a file of the right size: only a checksum would find these."""
    two_ranks.run(train, str(tmp_path), True)
    older, newer = (tmp_path / name for name in SAVED)
    assert checkpoint.get_last_complete_checkpoint(tmp_path) == str(newer)
    names = {path.name for path in newer.iterdir()} - {checkpoint.STATE}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"} < names
    kept = tmp_path / "kept"
    shutil.copytree(newer, kept)
    for damage, words in DAMAGES.items():
        for name in sorted(names):
            damage(newer / name)
            inside = damage in (never_on_the_disk, another_byte) and name == "model.safetensors"
            # Small files are mostly padding, and JSON with another letter is JSON.
            harmless = damage is another_byte and not name.startswith(("optimizer", "rng_state"))
            if not (inside or harmless):
                assert checkpoint.get_last_complete_checkpoint(tmp_path) == str(older), (damage, name)
                with pytest.raises(hf_usp.UspConfigError, match=f"{name} ({words}).*continue from {older}"):
                    checkpoint.check_checkpoint_complete(newer)
            shutil.copy2(kept / name, newer / name)
    checkpoint.check_checkpoint_complete(newer)


def dies_before_its_random_state(folder: str) -> None:
    """Rank 1 in its second save. Rank 0 does not wait for it."""
    if dist.get_rank() == 1:
        stock = Trainer._save_rng_state

        def save(self: Trainer, output_dir: str) -> None:
            if output_dir.endswith(SAVED[1]):
                # Not before rank 0 has saved its part: a message of the last step could be lost with this process.
                end = time.monotonic() + 20
                while not (Path(output_dir) / checkpoint.STATE).exists() and time.monotonic() < end:
                    time.sleep(0.02)
                os._exit(9)
            stock(self, output_dir)

        Trainer._save_rng_state = save  # type: ignore[method-assign]
    train(folder, True)


def test_a_rank_that_dies_while_it_saves(two_ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="rank 1 of 2: the process died"):
        two_ranks.run(dies_before_its_random_state, str(tmp_path))
    assert (tmp_path / SAVED[1] / checkpoint.STATE).exists()
    assert checkpoint.get_last_complete_checkpoint(tmp_path) == str(tmp_path / SAVED[0])
    with pytest.raises(hf_usp.UspConfigError, match="rng_state_1.pth is missing"):
        checkpoint.check_checkpoint_complete(tmp_path / SAVED[1])
