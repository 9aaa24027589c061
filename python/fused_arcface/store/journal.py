"""The journal of a store: each row as it was at a checkpoint, kept once before its first change after it.

A journal has a number. Its rows undo all changes made since it was begun. To bring back the rows of the moment when a
journal was begun, undo all journals from the newest to this one. That moment is a *state*; a checkpoint names it.

A file is a list of batches, each with a checksum. A process that is killed leaves half a batch at most, at the end. No
row is changed before the batch that has it is whole, so half a batch does no harm. An empty batch seals a journal that
gets no more rows. A damaged batch and all batches after it are not undone; :meth:`FileRows.go_back` then finds rows
whose markers are too new.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..base.reading import DataError, open_regular
from .columns import Columns, Tensors
from .records import Records, StoreError

_HEADER = struct.Struct("<8sqqI4x")  # magic, rows with a former content, rows that were never touched, CRC-32
_MAGIC = b"faROWS01"
SEAL = _HEADER.pack(_MAGIC, 0, 0, 0)
"""The end of a journal: a batch without rows."""
_NAME = re.compile(r"journal_(\d{12})\.(\d+)-(\d+)")


def journals(folder: Path) -> dict[int, list[Path]]:
    """Return the files of each journal in a folder, by its number, in ascending order."""
    found: dict[int, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        match = _NAME.fullmatch(path.name)
        if match:
            found.setdefault(int(match[1]), []).append(path)
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Batch:
    """Some rows of a journal."""

    path: Path
    columns: Columns
    start: int
    """First byte of the former content of all rows."""
    count: int
    """Number of rows with a former content."""
    rows: Tensor
    """(K,) int64 global numbers, ascending, of rows with a former content: all, or those of a range."""
    untouched: Tensor
    """(U,) int64 global numbers, ascending, of rows that were never touched."""
    skipped: int = 0
    """Number of rows with a former content before the range."""

    def within(self, first: int, last: int) -> Batch:
        """Return the part of a whole batch that is in ``[first, last)``."""
        ends = torch.tensor([first, last])
        begin, end = torch.searchsorted(self.rows, ends).tolist()
        left, right = torch.searchsorted(self.untouched, ends).tolist()
        return replace(self, rows=self.rows[begin:end], untouched=self.untouched[left:right], skipped=begin)

    def former(self) -> tuple[Tensor, Tensors]:
        """Return the former markers and columns of the rows."""
        with _opened(self.path) as file:

            def part(offset: int, width: int, dtype: torch.dtype) -> Tensor:
                size = width * dtype.itemsize
                file.seek(self.start + offset * self.count + self.skipped * size)
                return _tensor_of(file.read(len(self.rows) * size), dtype).view(-1, width)

            markers, offset, tensors = part(0, 1, torch.int64).squeeze(1), 8, {}
            for column in self.columns.each:
                tensors[column.name] = part(offset, column.width, column.dtype)
                offset += column.bytes
        return markers, tensors


def _opened(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except DataError as error:
        raise StoreError(str(error)) from None


def _bytes_of(tensor: Tensor) -> memoryview:
    array: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _tensor_of(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


class Journal:
    """A new journal of rows ``[first, last)``, to which batches are added.

    Its number is greater than that of every journal before it.
    """

    def __init__(self, folder: Path, number: int, first: int, last: int, columns: Columns) -> None:
        self.number, self._columns = number, columns
        self._path = folder / f"journal_{number:012d}.{first}-{last}"
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._size, self._synced = 0, 0

    def add(self, rows: Tensor, markers: Tensor, tensors: Tensors, untouched: Tensor) -> None:
        """Add the former content of rows (K,), and the numbers of rows that were never touched (U,).

        Raises:
            StoreError: if there is no room. The journal is as it was.
        """
        if len(rows) + len(untouched) == 0:
            return
        arrays = [rows, untouched, markers, *(tensors[column.name] for column in self._columns.each)]
        data = [_bytes_of(each) for each in arrays if each.numel() > 0]
        checksum = 0
        for part in data:
            checksum = zlib.crc32(part, checksum)
        position = self._size
        try:
            for part in [memoryview(_HEADER.pack(_MAGIC, len(rows), len(untouched), checksum)), *data]:
                while part:
                    written = os.pwrite(self._file, part, position)
                    position, part = position + written, part[written:]
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise StoreError(f"{self._path}: there is no room for rows that will change: {error}") from error
        self._size = position

    def seal(self) -> None:
        """Add the seal: no more rows come. If the disk is full, the journal stays without it."""
        with contextlib.suppress(OSError):
            self._size += os.pwrite(self._file, SEAL, self._size) // len(SEAL) * len(SEAL)

    def sync(self) -> None:
        """Put the batches so far on disk."""
        size = self._size
        if size > self._synced:
            os.fdatasync(self._file) if hasattr(os, "fdatasync") else os.fsync(self._file)
            self._synced = size

    def close(self) -> None:
        os.close(self._file)


def batches(path: Path, columns: Columns) -> Iterator[Batch]:
    """Yield the batches of a journal's file in order, up to the first that is damaged or not whole."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    first, last = int(match[2]), int(match[3])
    with _opened(path) as file:
        size, position = os.fstat(file.fileno()).st_size, 0
        while position + _HEADER.size <= size:
            file.seek(position)
            magic, kept, untouched, checksum = _HEADER.unpack(file.read(_HEADER.size))
            length = 8 * (kept + untouched) + kept * (8 + columns.row_bytes)
            start = position + _HEADER.size
            position = start + length
            if magic != _MAGIC or kept < 0 or untouched < 0 or position > size:
                return
            numbers = file.read(8 * (kept + untouched))
            found, remaining = zlib.crc32(numbers), kept * (8 + columns.row_bytes)
            while remaining > 0:
                part = file.read(min(remaining, 1 << 24))
                found, remaining = zlib.crc32(part, found), remaining - len(part)
            if found != checksum:
                return
            ids = _tensor_of(numbers, torch.int64)
            if not all(_ascend(each, first, last) for each in (ids[:kept], ids[kept:])):
                return
            yield Batch(path, columns, start + len(numbers), kept, ids[:kept], ids[kept:])


def _ascend(rows: Tensor, first: int, last: int) -> bool:
    """Return whether rows (K,) ascend within ``[first, last)``."""
    if len(rows) == 0:
        return True
    return first <= int(rows[0]) and int(rows[-1]) < last and bool((rows[1:] > rows[:-1]).all())


def damaged(folder: Path, number: int) -> str:
    """Return the error message for a store with rows that journal ``number`` ought to have kept."""
    return (
        f"{folder} is damaged: journal_{number:012d} lacks rows that have changed since the checkpoint. Restore the "
        "folder from a copy, or begin anew with another one"
    )


def all_whole(files: dict[int, list[Path]], columns: Columns) -> bool:
    """Return whether the files of journals are whole: no batch is damaged, and each ends with a seal.

    The newest journal may have no seal.
    """
    for number, paths in files.items():
        for path in paths:
            last = next(iter(deque(batches(path, columns), maxlen=1)), None)
            end = 0 if last is None else last.start + last.count * (8 + columns.row_bytes)
            is_sealed = last is not None and len(last.rows) + len(last.untouched) == 0
            if end != path.stat().st_size or not (is_sealed or number == max(files)):
                return False
    return True


def undoing(files: dict[int, list[Path]], columns: Columns, first: int, last: int) -> Iterator[Batch]:
    """Yield the parts of the journals' batches in ``[first, last)``, in the order of undoing."""
    for number in sorted(files, reverse=True):
        for path in files[number]:
            for batch in reversed(list(batches(path, columns))):
                part = batch.within(first, last)
                if len(part.rows) + len(part.untouched) > 0:
                    yield part


def undo(records: Records, files: dict[int, list[Path]], first: int, last: int) -> None:
    """Bring rows ``[first, last)`` back to what they were when the oldest of the journals was begun."""
    for batch in undoing(files, records.columns, first, last):
        markers, tensors = batch.former()
        records.write(batch.rows, tensors, markers)
        records.clear(batch.untouched)


def overlay(files: dict[int, list[Path]], columns: Columns, first: int, markers: Tensor, out: Tensors) -> None:
    """Undo journals in rows ``first, first + 1, ...`` that have been read: the file stays as it is."""
    for batch in undoing(files, columns, first, first + len(markers)):
        kept, untouched = batch.rows - first, batch.untouched - first
        markers[kept], tensors = batch.former()
        markers[untouched] = 0
        for name, tensor in out.items():
            tensor[kept] = tensors[name]
            tensor[untouched] = 0
