"""The folders under a root of checkpoints: their names and order, and how they are made, published and removed.

Several processes may write under one root. Each locks the folder that it writes in, until it ends. The names under a
root change only while the root is locked, which takes a moment.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..base import files
from . import manifest
from .manifest import STEP_NAME
from .storage import BLOCK, METADATA, CheckpointError

_LATEST, _PARTIAL = "latest", ".partial-"
_UNFINISHED = re.compile(r"\.partial-step_\d+(\.\d+)?")


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a folder during the block. On a file system without locks, do nothing.

    Raises:
        BlockingIOError: if another writer holds it and ``wait`` is false.
    """
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)  # a process that was forked meanwhile would keep it
        os.close(file)


@contextlib.contextmanager
def unfinished(root: Path, step: int) -> Iterator[Path]:
    """Make the folder in which the next checkpoint of a step is written, for :func:`publish`.

    If it has not been published at the end of the block, it is removed.
    """
    root.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as lock:
        with _locked(root):
            _remove_left(root)  # the disk may have no room for both
            names = [path.name.removeprefix(_PARTIAL) for path in root.iterdir()]
            number = 1 + max((order[1] for order in map(_order, names) if order[0] == step), default=-1)
            partial = root / (f"{_PARTIAL}step_{step:010d}" + (f".{number}" if number else ""))
            partial.mkdir()
            lock.enter_context(_locked(partial))
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def publish(partial: Path) -> Path:
    """Rename a finished folder to the name of its checkpoint. Return the new path when the rename is on disk."""
    root = partial.parent
    final = root / partial.name.removeprefix(_PARTIAL)
    with _locked(root):
        partial.rename(final)
        files.sync_directory(root)
    return final


def settle(newest: Path, keep: int) -> None:
    """Write the name ``latest``, and remove the oldest checkpoints of this package, so that ``keep`` are left.

    The newest one stays. If one cannot be removed, this is a warning.
    """
    with _locked(newest.parent):
        name = newest.parent / _LATEST  # for people and other programs: nothing here reads it
        if name.is_file() or not name.exists():
            with contextlib.suppress(OSError):
                files.write_text(name, newest.name)
        others = [path for path in complete(newest.parent) if path != newest and _is_ours(path)]
        for old in others[: max(0, len(others) + 1 - keep)]:
            try:
                # If this process dies here, half a checkpoint must not look like a whole one.
                shutil.rmtree(old.rename(old.with_name(_PARTIAL + old.name)))
            except OSError as error:
                warnings.warn(f"{old} is no longer needed, and cannot be removed: {error}", stacklevel=2)


def keep_alone(directory: Path, root: Path) -> Path:
    """Keep a complete checkpoint under another root as well, in place of the checkpoints there; return its new place.

    Its files are linked, which takes no room, or copied where the file system has no links. Called by one process.

    Raises:
        OSError: if it cannot be written. Those in ``root`` are as they were.
    """
    content = (directory / manifest.NAME).read_bytes()  # it has the checksums of all other files
    step = _order(directory.name)[0]
    of_step = (path for path in complete(root) if _order(path.name)[0] == step)
    target = next((path for path in of_step if (path / manifest.NAME).read_bytes() == content), None)
    if target is None:
        with unfinished(root, step) as partial:
            for file in directory.iterdir():
                _link(file, partial / file.name)
            files.sync_directory(partial)
            target = publish(partial)
    settle(target, keep=1)
    return target


def _link(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:
        with files.replacing(target) as copy, file.open("rb") as content:
            shutil.copyfileobj(content, copy, BLOCK)


def remove_unfinished(root: Path) -> None:
    """Remove checkpoints that were being written or removed when a process died."""
    with _locked(root):
        _remove_left(root)


def _remove_left(root: Path) -> None:
    for path in root.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            with contextlib.suppress(OSError), _locked(path, wait=False):
                shutil.rmtree(path, ignore_errors=True)


def _order(name: str) -> tuple[int, int]:
    """Return step and number of a checkpoint's name, (-1, -1) for any other name."""
    match = STEP_NAME.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, -1)


def complete(root: Path) -> list[Path]:
    """Return the checkpoints under ``root``, the oldest first: folders with the exact name and the files of one."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if STEP_NAME.fullmatch(path.name) and has_checkpoint(path)]
    return sorted(found, key=lambda path: _order(path.name))


def before(directory: Path) -> list[Path]:
    """Return the checkpoints that are older than the one in ``directory``, from the oldest to the newest."""
    return [path for path in complete(directory.parent) if _order(path.name) < _order(directory.name)]


def has_checkpoint(path: Path) -> bool:
    """Return whether a folder holds a checkpoint, of this package or of another program."""
    return (path / manifest.NAME).exists() or (path / METADATA).exists()


def _is_ours(path: Path) -> bool:
    """Return whether a folder may be removed: it has this package's manifest, and is no link to another place."""
    try:
        return not path.is_symlink() and bool(manifest.read_content(path))
    except CheckpointError:
        return False


def latest(root: str | os.PathLike[str]) -> Path | None:
    """Return the checkpoint of the highest step under ``root``, None if there is none yet."""
    return next(reversed(complete(Path(root))), None)
