"""Reading of files from anywhere: one error for all that can be wrong with them, and regular files only."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .extras import MissingExtra
from .suggest import missing_path
from .text import decode_names, lines

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_POINTER = b"version https://git-lfs.github.com/spec/"


class DataError(ValueError):
    """Data that cannot be used; the message names the file and the place in it."""


class NoSuchData(DataError):
    """A path that does not exist, or a text that names no data: the argument is wrong, not a file's content."""


@contextlib.contextmanager
def file_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn every error that a decoder raises for the content of ``path`` into a DataError.

    Decoders raise errors of any type for bytes that nobody wrote, so no list of types would be complete. Errors that
    are DataErrors already pass as they are, and so does a missing library.

    >>> with file_errors("a.toml"):
    ...     [][0]
    Traceback (most recent call last):
    ...
    fused_arcface.base.reading.DataError: a.toml cannot be read: list index out of range
    """
    try:
        yield
    except (DataError, MissingExtra):
        raise
    except FileNotFoundError:
        raise NoSuchData(missing_path(path)) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:
        raise DataError(f"{path} cannot be read: {said(error)}") from None


def said(error: Exception) -> str:
    """Return the start of the first line of an error's text, or its type if it has none (MemoryError).

    A decoder's text may quote the file, which may have a line of any length.
    """
    lines = str(error).splitlines()
    return lines[0][:300] if lines and lines[0] else type(error).__name__


def check_regular(path: str | os.PathLike[str]) -> int:
    """Check a file as :func:`open_regular` does, and return its size in bytes.

    For libraries that open files themselves.

    Raises:
        DataError: if it cannot be opened, is not a regular file, or is a Git LFS pointer.

    >>> check_regular("/dev/null")
    Traceback (most recent call last):
    ...
    fused_arcface.base.reading.DataError: /dev/null must be a regular file; it is a device
    """
    with open_regular(path) as file:
        return os.fstat(file.fileno()).st_size


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading bytes.

    Opening a named pipe would wait for a writer without an end, and a device has no size. A Git LFS pointer is the
    small text file that a Git repository holds instead of a large one.

    Raises:
        DataError: if it cannot be opened, is not a regular file, or is a Git LFS pointer.

    >>> open_regular("/dev")
    Traceback (most recent call last):
    ...
    fused_arcface.base.reading.DataError: /dev must be a regular file; it is a folder
    """
    with file_errors(path):
        found = os.stat(path)
    _check_kind(path, found)
    with file_errors(path):
        # The file may have been replaced since the check: without O_NONBLOCK a named pipe would wait here.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
    try:
        _check_kind(path, os.fstat(file.fileno()))
        with file_errors(path):
            start = file.read(len(_POINTER))
            file.seek(0)
        if start == _POINTER:
            raise DataError(f"{path} is a Git LFS pointer, not the file itself; fetch that with: git lfs pull")
    except DataError:
        file.close()
        raise
    return file


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """Return the content of a regular file of at most ``most`` bytes.

    Raises:
        DataError: if it cannot be read, or is longer.
    """
    with open_regular(path) as file, file_errors(path):
        content = file.read(most + 1)
    if len(content) > most:
        raise DataError(f"{path} must have <= {most} bytes; it has more")
    return content


def read_lines(path: str | os.PathLike[str]) -> list[tuple[int, str]]:
    """Return the lines of a text file that are not empty, each with its number, from 1; see :func:`open_regular`."""
    with open_regular(path) as file, file_errors(path):
        return [(number, line) for number, line in enumerate(lines(file.read()), start=1) if line.strip()]


def read_names(path: str | os.PathLike[str]) -> list[str]:
    """Return the names in a file that holds what :func:`fused_arcface.base.text.encode_names` wrote.

    Raises:
        DataError: if it cannot be read, or is not a regular file.
    """
    with open_regular(path) as file, file_errors(path):
        return decode_names(file.read())


def _check_kind(path: str | os.PathLike[str], found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise DataError(f"{Path(path)} must be a regular file; it is {kind}")
