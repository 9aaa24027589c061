"""The lock of a folder: only one process at a time writes into it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from pathlib import Path

LOCK = "run.lock"
"""Name of the file that is locked."""
_HELD = (errno.EACCES, errno.EAGAIN)


class FolderInUse(Exception):
    """Raised if another process holds the lock; the message names the process."""


class FolderLock:
    """The lock ``run.lock`` in an existing folder, until :meth:`close` or the end of this process, however it ends.

    It is a POSIX record lock: the kernel releases it, and the processes of a data loader do not inherit it. A file
    system without locks locks nothing.

    Raises:
        FolderInUse: if another process holds the lock.
        OSError: if the file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._take()
        while not self.is_in_place():  # its owner removed it between the opening and the lock
            self.close()
            self._take()

    def _take(self) -> None:
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _HELD:
                    owner = os.pread(self._file, 1000, 0).decode(errors="replace").strip()
                    raise FolderInUse(owner or "another process") from None
            os.ftruncate(self._file, 0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode(), 0)
            undo.pop_all()

    def is_in_place(self) -> bool:
        """Return whether the folder is still the one that was locked: not removed, renamed or made anew."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file))
        except OSError:
            return False

    def remove(self) -> None:
        """Remove the file. A process that has just opened it notices this once it has the lock."""
        self._path.unlink()

    def close(self) -> None:
        """Release the lock. The file stays."""
        os.close(self._file)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
