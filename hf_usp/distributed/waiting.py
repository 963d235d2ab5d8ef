"""A rank that waits long at the start of a sharded forward logs the ranks that it waits for, and likely causes.

The first message of a forward needs all ranks of the mesh. One that computes a batch alone (the main process, say)
waits there until the time limit of the group. Whoever waits for a second notes it in the store of the process group;
after `PATIENCE` seconds the first of those who wait logs who is missing. Nothing ends by that: the others may be slow.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress

import torch.distributed as dist

from ..compat import default_store
from ..errors import UspRankError
from .failures import KEY

logger = logging.getLogger(__name__)

NOTE, PATIENCE = 1.0, 5.0  # seconds
ALONE = (
    "let all ranks compute a batch that one rank wants, and that one print; or, with whole weights (no FSDP, no "
    "ZeRO-3), call accelerator.unwrap_model(model).forward(**batch) under torch.no_grad(), which is not sharded"
)


def wait_for_all(work: dist.Work, group: dist.ProcessGroup) -> None:
    """Wait for the message that begins a forward; logs a warning, once, if ranks are missing for `PATIENCE` seconds.

    Raises `UspRankError` with the same words where that wait ends by the group's time limit, or with a rank's process.
    """
    start, noted, said = time.monotonic(), False, False
    while not (said or work.is_completed()):  # works of some backends know that they are completed only in `wait`
        waited = time.monotonic() - start
        time.sleep(min(waited / 8, 1e-3))  # adds little to a wait of any length
        if waited > NOTE and not noted:
            noted = True
            _note(group, here=True)
        if waited > PATIENCE and not said:
            said = True
            missing, first = _missing(group)
            if first:
                logger.warning("%s", _late(missing or "that are on their way", f"for {PATIENCE:.0f} s"))
    try:
        work.wait()
    except RuntimeError as problem:
        missing, _ = _missing(group)
        if not said or not missing or _someone_failed():
            raise
        raise _late(missing, "until the time limit of the group, or the end of a rank,") from problem
    if noted:
        _note(group, here=False)


def _late(missing: str, how_long: str) -> UspRankError:
    return UspRankError(
        f"rank {dist.get_rank()} has waited {how_long} at the start of a sharded forward for rank(s) {missing}",
        rule="all ranks of a mesh take part in every forward, in evaluation too; one that computes a batch alone "
        "(`if accelerator.is_main_process:`) waits for the others, as do all where one has fewer batches or is slow",
        remedy=ALONE,
    )


def _key(group: dist.ProcessGroup, rank: int) -> str:
    return f"hf_usp/waiting/{group.group_name}/{rank}"


def _note(group: dist.ProcessGroup, here: bool) -> None:
    """Note that this rank waits, or does so no longer."""
    with suppress(RuntimeError):  # the store may be gone already
        store, key = default_store(), _key(group, dist.get_rank())
        store.set(key, "waits") if here else store.delete_key(key)


def _missing(group: dist.ProcessGroup) -> tuple[str, bool]:
    """The ranks that do not wait (or not for long), and whether this rank is the first of those who do."""
    ranks = dist.get_process_group_ranks(group)
    waiting = {dist.get_rank()}
    with suppress(RuntimeError):
        store = default_store()
        waiting |= {rank for rank in ranks if store.check([_key(group, rank)])}
    return ", ".join(str(rank) for rank in ranks if rank not in waiting), dist.get_rank() == min(waiting)


def _someone_failed() -> bool:
    with suppress(RuntimeError):
        return bool(default_store().check([KEY]))
    return False
