"""Checks that a resumed run has the rows, batches and model of the run that was interrupted.

    from hf_usp.resume import ResumeGuard

    trainer.add_callback(ResumeGuard())
    trainer.train(resume_from_checkpoint=...)

The Trainer compares three intervals and a batch size, and warns. With other rows or another number of ranks that hold
different ones it skips as many batches as before and trains on what comes then; a model with more layers than the
checkpoint starts with some that are random.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.trainer_callback import ExportableState, TrainerCallback

from ..compat import tree_map
from ..errors import UspConfigError
from ..models.find import find_model
from ..utils.validation import size_from_environment
from .checkpoint import describe_files

LOOKED_AT = 16
# Settings of a model's configuration that may change between two runs of the same model.
FREE = {"_attn_implementation_internal", "_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}


class ResumeGuard(TrainerCallback, ExportableState):
    """Writes into every checkpoint what a run is, and refuses to continue one of another.

    Compared are the number of rows and sixteen of them, spread evenly (of datasets with a length; rows must not change
    from one look to the next), the rows of a step, and the model's configuration. A checkpoint that was saved without
    this callback is continued.

    Raises:
        UspConfigError: on every rank, before the first step.
    """

    def __init__(self) -> None:
        self.run: dict[str, Any] | None = None
        self.saving: tuple[Any, Any] | None = None  # arguments and state of the Trainer while it trains

    def state(self) -> dict[str, Any]:
        """As the Trainer writes it into `trainer_state.json`: it asks when all other files of this rank are written."""
        return {"args": {}, "attributes": {}, "run": self.run, "files": self._files()}

    def _files(self) -> dict[str, int] | None:
        """Of the checkpoint that is being saved; None before the training begins, and in a search's folders."""
        if self.saving is None:
            return None
        args, state = self.saving
        each = args.save_on_each_node
        count = size_from_environment("LOCAL_WORLD_SIZE", os.environ) if each else args.world_size
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        return describe_files(folder, range(args.process_index, args.process_index + count))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer has read the state of the checkpoint, if there is one."""
        self.saving = args, state
        self.run = describe(kwargs["model"], kwargs["train_dataloader"], args.gradient_accumulation_steps)
        saved = (state.stateful_callbacks.get(type(self).__name__) or {}).get("run")
        found = [] if saved is None else differences(saved, self.run)
        if found:
            raise UspConfigError(
                f"a checkpoint of step {state.global_step} that another run has saved: " + "; ".join(found),
                rule="a run that continues has the same rows in the same batches and the same model",
                remedy="continue with what the checkpoint was made with; or start a new run from its weights "
                "(from_pretrained); or leave out ResumeGuard to go on all the same",
            )


def describe(model: Any, loader: Any, accumulation: int) -> dict[str, Any]:
    """The values that are compared, as JSON returns them."""
    config = {name: x for name, x in find_model(model).config.to_diff_dict().items() if name not in FREE}
    rows = getattr(loader, "total_batch_size", None)
    run = {"rows a step": None if rows is None else rows * accumulation, **look_at(loader.dataset), "model": config}
    return json.loads(json.dumps(run, default=str))


def look_at(dataset: Any) -> dict[str, Any]:
    """The number of rows and a checksum of some; nothing for a dataset without a length."""
    try:
        count = len(dataset)
    except TypeError:
        return {}
    places = sorted({i * (count - 1) // (LOOKED_AT - 1) for i in range(LOOKED_AT)}) if count else []
    some = [tree_map(lambda x: x.tolist() if isinstance(x, Tensor) else x, dataset[i]) for i in places]
    return {"number of rows": count, "checksum of sixteen rows": zlib.crc32(repr(some).encode())}


def differences(saved: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """In words."""
    pairs = [(name, saved[name], here[name]) for name in here.keys() & saved.keys() if name != "model"]
    before, now = saved["model"], here["model"]
    pairs += [(f"model.{name}", before.get(name), now.get(name)) for name in before.keys() | now.keys()]
    return [f"{name} {there!r}, here {mine!r}" for name, there, mine in sorted(pairs) if there != mine]
