"""Which checkpoint of a run may be continued.

The Trainer writes `trainer_state.json` after weights, optimizer and scheduler, but without waiting for the random
states of the other ranks. A run that is killed while it saves leaves a checkpoint without one of them, or with half of
it; `Trainer.train(resume_from_checkpoint=True)` would take that one, and goes on silently where a file is missing.

`hf_usp.callbacks.resume.ResumeGuard` records names and sizes of the files and the number of ranks (`describe_files`).
Compared are these, and what formats tell by themselves: safetensors and zip archives that end where they say, JSON that
can be parsed, checksums of small zip archives. That reads headers, not weights: bits of weights that changed on the
disk, in a file of the right size, are not found.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import UspConfigError

STATE = "trainer_state.json"
RECORD = "ResumeGuard"  # under which the Trainer keeps the state of that callback
ZIPS = (".pt", ".pth", ".bin")
SUMMED = 64 << 20  # bytes up to which the checksums inside a zip archive are compared
_NAME = re.compile(r"checkpoint-(\d+)")
# Errors that parsers raise for files that are damaged.
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError, zipfile.BadZipFile)


def get_last_complete_checkpoint(folder: str | Path) -> str | None:
    """The newest complete checkpoint in the output folder of a Trainer; None where there is none.

    `trainer.train(resume_from_checkpoint=get_last_complete_checkpoint(args.output_dir))` starts anew or continues. Any
    number of processes may have written it, and any number may continue. With `hf_usp.callbacks.resume.ResumeGuard` no
    file may be missing.
    """
    found = [(int(m[1]), path) for path in Path(folder).glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    newest = (path for _, path in sorted(found, reverse=True) if what_is_missing(path) is None)
    return next(map(str, newest), None)


def check_checkpoint_complete(checkpoint: str | Path) -> None:
    """Raise `UspConfigError` unless a checkpoint was saved to its end and still has what was saved."""
    problem = what_is_missing(Path(checkpoint))
    if problem is not None:
        last = get_last_complete_checkpoint(Path(checkpoint).parent)
        raise UspConfigError(
            f"the checkpoint {checkpoint}: {problem}",
            rule=f"a checkpoint is complete once its {STATE} is written, which comes last, and with the files of every "
            "rank as they were saved",
            remedy="its run was cut off while it saved, or its files were damaged later; "
            + (f"continue from {last}" if last else "there is no older complete one beside it: start anew"),
        )


def what_is_missing(checkpoint: Path) -> str | None:
    """In words; None for a complete checkpoint."""
    if not checkpoint.is_dir():
        return "no such folder"
    state = checkpoint / STATE
    if not state.is_file():
        return f"no {STATE}"
    try:
        content = json.loads(state.read_text(encoding="utf-8"))
        step, record = content["global_step"], content.get("stateful_callbacks", {}).get(RECORD) or {}
        record = record[-1] if isinstance(record, list) else record  # of several callbacks, or several runs
        sizes = {str(name): int(size) for name, size in (record.get("files") or {}).items()}
    except _DAMAGED:
        return f"{STATE} is cut off"
    except OSError as problem:
        return f"{STATE} cannot be read ({problem.strerror})"
    named = _NAME.fullmatch(checkpoint.name)
    if named is not None and int(named[1]) != step:
        return f"{STATE} is of step {step}"
    return next(_damages(checkpoint, sizes), None)


def describe_files(checkpoint: Path, ranks: Iterable[int]) -> dict[str, int] | None:
    """The least size of every file, by its name, right before `trainer_state.json` is written; None without the folder.

    ranks: all that write into this folder, this one first. The others may not be done: files of theirs may still grow,
    and their random states may not be there yet.
    """
    if not checkpoint.is_dir():
        return None
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in _files(checkpoint)}
    first, *others = (f"rng_state_{rank}.pth" for rank in ranks)
    if first in sizes:  # not with save_only_model, and not in a single process
        sizes |= dict.fromkeys(others, 1)  # what is there may be of a run that was cut off here
    return sizes


def _damages(checkpoint: Path, sizes: dict[str, int]) -> Iterator[str]:
    """Faults of the files beside the state, as text; missing files first."""
    yield from (f"{name} is missing" for name in sizes if not (checkpoint / name).is_file())
    for path in _files(checkpoint):
        name = path.relative_to(checkpoint).as_posix()
        try:
            size = path.stat().st_size
            if size < sizes.get(name, 0):
                yield f"{name} has {size:,} bytes of {sizes[name]:,}"
            if not _ends_where_it_says(path, size):
                yield f"{name} is damaged"
        except _DAMAGED:
            yield f"{name} is damaged"
        except OSError as problem:
            yield f"{name} cannot be read ({problem.strerror})"


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != STATE)


def _ends_where_it_says(path: Path, size: int) -> bool:
    """Whether a file is whole by its own format; True for other formats. Raises one of `_DAMAGED` for a broken one."""
    if path.suffix == ".safetensors":
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > size - 8:
                return False
            header = json.loads(stream.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return 8 + length + max(ends, default=0) == size
    if path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix in ZIPS:
        with zipfile.ZipFile(path) as archive:
            return size > SUMMED or archive.testzip() is None
    return True
