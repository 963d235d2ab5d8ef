"""Which checkpoint of a run may be continued.

The Trainer writes `trainer_state.json` after weights, optimizer and scheduler. A run that is killed while it saves
leaves a checkpoint without it, or with half of it; `Trainer.train(resume_from_checkpoint=True)` would take that one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from .errors import UspConfigError

STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def last_complete(folder: str | Path) -> str | None:
    """The newest complete checkpoint in the output folder of a Trainer; None where there is none.

    `trainer.train(resume_from_checkpoint=last_complete(args.output_dir))` starts anew or continues. Any number of
    processes may have written it, and any number may continue.
    """
    found = [(int(m[1]), path) for path in Path(folder).glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    complete = [path for _, path in sorted(found) if what_is_missing(path) is None]
    return str(complete[-1]) if complete else None


def check_complete(checkpoint: str | Path) -> None:
    """Raise `UspConfigError` unless a checkpoint was saved to its end."""
    problem = what_is_missing(Path(checkpoint))
    if problem is not None:
        last = last_complete(Path(checkpoint).parent)
        raise UspConfigError(
            f"the checkpoint {checkpoint}: {problem}",
            rule=f"a checkpoint is complete once its {STATE} is written, which comes last",
            remedy="its run was cut off while it saved; "
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
        step = json.loads(state.read_text(encoding="utf-8"))["global_step"]
    except (ValueError, KeyError, TypeError):
        return f"{STATE} is cut off"
    named = _NAME.fullmatch(checkpoint.name)
    return None if named is None or int(named[1]) == step else f"{STATE} is of step {step}"
