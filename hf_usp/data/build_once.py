"""A dataset that one process builds for all: a folder, made behind a file lock."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UspConfigError
from ..utils.validation import check_folder

UNFINISHED = ".unfinished"


def build_once(folder: str | os.PathLike[str], build: Callable[[], Any]) -> Any:
    """The dataset that `build` makes, kept in `folder`: built by the first process that asks, read by all others.

    A file lock beside the folder makes them wait, however long it takes, with or without a process group; it is freed
    where the builder dies, and the next one builds. The folder appears when it is complete. Processes that do not
    share a file system build one each.

    Raises `UspConfigError` for a folder that cannot be made or read, or that somebody else may have put there.
    """
    from filelock import FileLock

    folder = Path(folder)
    if not folder.exists():
        check_folder(str(folder.parent), "cache_dir")
        lock = FileLock(f"{folder}.lock")
        try:
            lock.acquire()
        except OSError as problem:
            raise UspConfigError(
                f"the lock {folder}.lock: {problem}",
                rule="all processes of a run may lock it",
                remedy="delete it if no run of another user is building there, or name another cache_dir",
            ) from problem
        try:
            if not folder.exists():
                _build(folder, build)
        finally:
            lock.release()
    _check_owner(folder)
    return _load(folder)


def _build(folder: Path, build: Callable[[], Any]) -> None:
    """Into a folder of a name that nobody can guess, moved to its place when it lies on the disk."""
    for left in folder.parent.glob(f"{folder.name}.*{UNFINISHED}"):
        shutil.rmtree(left, ignore_errors=True)  # of a process that died here; links are not followed
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=UNFINISHED, dir=folder.parent))
    build().save_to_disk(unfinished)
    for path in (*unfinished.rglob("*"), unfinished):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    mask = os.umask(0)
    os.umask(mask)
    unfinished.chmod(0o777 & ~mask)  # as any folder; a temporary one is its owner's alone
    os.replace(unfinished, folder)


def _check_owner(folder: Path) -> None:
    """Where everybody may write, everybody may have put rows in the way of this run: names can be guessed."""
    found, around = folder.lstat(), folder.parent.stat()
    if around.st_mode & 0o002 and found.st_uid not in (os.getuid(), around.st_uid, 0):
        raise UspConfigError(
            f"{folder}, which user {found.st_uid} has put into a folder that everybody may write to",
            rule="rows are read that this user, the owner of the folder or root has made",
            remedy="name a cache_dir of your own, or take the right to write to it from others (chmod o-w)",
        )


def _load(folder: Path) -> Any:
    from datasets import load_from_disk

    try:
        return load_from_disk(str(folder))
    except Exception as problem:  # whatever Arrow and JSON say of files that are cut
        raise UspConfigError(
            f"{folder} cannot be read ({type(problem).__name__}: {problem})",
            rule="it holds a complete dataset, as build_once has made it",
            remedy=f"delete it, and it is built again: rm -r {str(folder)!r}",
        ) from problem
