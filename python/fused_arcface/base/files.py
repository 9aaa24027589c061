"""Write files so that a reader finds the old content or the new one, whole, whenever the process or the machine dies.

Every file that this package writes and reads again goes through here: options, logs, lists of classes, manifests,
models, figures.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EACCES}
_PARTIAL = ".partial-"


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the place of ``path`` when the block ends without an error.

    The bytes go to a file beside it named ``.partial-…``, are synced to disk, and replace ``path`` in one step. After
    an error ``path`` is as it was, and the partial file is removed. Only a killed process leaves it behind; the next
    writer of ``path`` removes it. Of several writers at a time the last one to end wins. The replaced file's
    permissions are kept, and a symbolic link keeps pointing to the file. A path that is not a regular file
    (``/dev/stdout``) is written directly.

    Raises:
        OSError: if the file cannot be written; ``filename`` is ``path`` where the system names none (a full disk).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(folder + "/x") as file:
    ...         _ = file.write(b"new")
    ...     os.listdir(folder)
    ['x']
    """
    if is_device(path):
        with Path(path).open("wb") as device:
            yield device
        return
    target = Path(os.path.realpath(path))
    partial = None
    try:
        partial, file = _partial_of(target)
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if target.exists():
                partial.chmod(target.stat().st_mode & 0o7777)
            os.replace(partial, target)
            partial = None
        finally:
            with contextlib.suppress(OSError):  # it flushes once more, and would hide an error
                file.close()
        sync_directory(target.parent)
    except OSError as error:
        if error.errno is not None and (error.filename is None or Path(error.filename).name.startswith(_PARTIAL)):
            raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error
        raise
    finally:
        if partial is not None:
            with contextlib.suppress(OSError):
                partial.unlink()


def _partial_of(target: Path) -> tuple[Path, BinaryIO]:
    """Open a new file to write ``target`` in, and remove one that a killed writer of ``target`` has left.

    A writer locks its file until it ends, so a file without a lock has been left. A second writer at the same time gets
    a file of another name.
    """
    partial = target.with_name(f"{_PARTIAL}{zlib.crc32(os.fsencode(target.name)):08x}")
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with contextlib.suppress(OSError), os.fdopen(os.open(partial, flags), "rb") as left:
        fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(left, partial):
            partial.unlink()
    try:
        file = partial.open("xb")
        with contextlib.suppress(OSError):  # a file system without locks: nobody removes it
            fcntl.flock(file, fcntl.LOCK_EX)
        if _is_at(file, partial):  # it may have been removed before it was locked
            return partial, file
        file.close()
    except FileExistsError:
        pass
    partial = partial.with_name(f"{partial.name}-{secrets.token_hex(6)}")
    return partial, partial.open("xb")


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Return true if an open file is still the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except OSError:
        return False


def write_bytes(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Replace the content of ``path``, as :func:`replacing` does."""
    with replacing(path) as file:
        file.write(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace the content of ``path`` by ``text`` as :func:`replacing` does, in UTF-8 in every locale.

    Line separators are written as they are. The name of a file that is not UTF-8 (surrogates in a ``str``) is written
    with its own bytes.
    """
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def is_device(path: str | os.PathLike[str]) -> bool:
    """Return true if ``path`` can only be written directly, as standard output, even if that goes to a file."""
    path = Path(path)
    standard = os.path.abspath(path).startswith(("/dev/std", "/dev/fd/"))
    return standard or (path.exists() and not path.is_file())


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Put the names in a directory on disk: new and renamed files are safe only then.

    Do nothing where the file system has no such call.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
