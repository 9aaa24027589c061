"""The lock of a store: a row belongs to one open store at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from .records import StoreError

LOCK = "lock"
"""Name of the file that is locked."""
_open_here: set[tuple[int, int]] = set()
"""Device and inode of each lock file that this process holds."""


def _key(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def locked_rows(folder: Path, first: int, last: int) -> Iterator[None]:
    """Lock rows ``[first, last)`` of a store during the block, or until this process ends, however it ends.

    It is a POSIX record lock with one byte for each row. The kernel releases it, and forked processes do not inherit
    it. Ranks lock their own rows.

    Raises:
        StoreError: if another process or another store of this process holds one of the rows.
    """
    path = folder / LOCK
    # Checked before the file is opened: closing it again would release this process's locks on it.
    if path.exists() and _key(os.stat(path)) in _open_here:
        raise StoreError(f"{folder} is open in this process: call close() on the head's center_store first")
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise StoreError(f"{path} cannot be opened: {error.strerror}") from error
    key = _key(os.fstat(file))
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, max(last - first, 1), first)
        if not path.exists() or _key(os.stat(path)) != key:  # removed meanwhile, by who held the lock
            raise BlockingIOError
    except OSError as error:
        os.close(file)
        if isinstance(error, BlockingIOError | PermissionError):
            raise StoreError(f"{folder} is in use by another process") from None
        raise StoreError(f"{folder} cannot be locked: {error}") from error
    _open_here.add(key)
    try:
        yield
    finally:
        _open_here.discard(key)
        os.close(file)
