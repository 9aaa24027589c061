"""The file of rows: one record for each row of weight, in the order of their global numbers.

A record begins with a marker: the number of the journal that last kept the row, 0 for a row that was never touched. The
file is sparse. A row that was never touched takes no space, and its center is a function of the seed and its number.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import torch
from torch import Tensor

from ..base.keyed_random import CENTER_STD, fill_normal_rows
from .columns import Columns, Tensors, scatter

try:
    from .. import _native
except ImportError:  # then there are no stores in files, and the head's error says so
    _native = None  # type: ignore[assignment]

MARKER_BYTES = 8
_ROWS_AT_ONCE = 1 << 20
_THREADS = 4  # a disk answers several reads at once


class StoreError(RuntimeError):
    """Raised if a store of class centers cannot be used, or cannot be written.

    Nothing was changed unless the message says so. It says how to go on.
    """


def unavailable() -> str | None:
    """Return why class centers cannot be kept in a file here, or None."""
    return "the compiled module fused_arcface._native cannot be imported" if _native is None else None


class Records:
    """An open file of rows, ``num_rows`` over all shards; made with no row touched if ``create`` is true."""

    def __init__(self, path: Path, columns: Columns, num_rows: int, seed: int, create: bool = False) -> None:
        self.path, self.columns, self.num_rows, self._seed = path, columns, num_rows, seed
        self.record_bytes = MARKER_BYTES + columns.row_bytes
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o666)
        except OSError as error:
            raise StoreError(f"{path} cannot be opened: {error.strerror}") from error
        try:
            if create:
                os.ftruncate(self._file, num_rows * self.record_bytes)
            size = os.fstat(self._file).st_size
            if size != num_rows * self.record_bytes:
                rule = f"{num_rows} records of {self.record_bytes} bytes"
                raise StoreError(f"{path} must have {rule}; it is {size} bytes long")
            if hasattr(os, "posix_fadvise"):  # rows are far apart: reading ahead would be wasted
                os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)
        except BaseException:
            os.close(self._file)
            raise

    def read(self, rows: Tensor, out: Tensors) -> Tensor:
        """Fill ``out``, if it has columns, with rows (K,) int64 global numbers; return their markers (K,) int64.

        A row that was never touched is zero; see :meth:`fill_untouched`.

        Raises:
            StoreError: if the file cannot be read.
        """
        markers = torch.empty(len(rows), dtype=torch.int64)
        self._transfer(False, rows, markers, out)
        return markers

    def fill_untouched(self, rows: Tensor, markers: Tensor, out: Tensors) -> Tensor:
        """Draw the centers of rows that were never touched, and return their places (U,). Their momentum is zero."""
        untouched = (markers == 0).nonzero().squeeze(1)
        weight = out["weight"]
        if len(untouched) == len(rows):
            fill_normal_rows(weight, self._seed, rows, CENTER_STD)
        elif len(untouched) > 0:
            initial = torch.empty(len(untouched), weight.shape[1], dtype=weight.dtype)
            fill_normal_rows(initial, self._seed, rows[untouched], CENTER_STD)
            scatter(weight, untouched, initial)
        return untouched

    def write(self, rows: Tensor, tensors: Tensors, marker: int | Tensor) -> None:
        """Write rows (K,) and their markers.

        Raises:
            StoreError: if the file cannot be written. Some of the rows may have been.
        """
        markers = marker if isinstance(marker, Tensor) else torch.full((len(rows),), marker, dtype=torch.int64)
        self._transfer(True, rows, markers, tensors)

    def clear(self, rows: Tensor) -> None:
        """Make rows (K,) untouched."""
        zeros = {column.name: torch.zeros(len(rows), column.width, dtype=column.dtype) for column in self.columns.each}
        self.write(rows, zeros, 0)

    @property
    def bytes_on_disk(self) -> int:
        """Bytes that the file takes; rows that were never touched take none."""
        return os.fstat(self._file).st_blocks * 512

    def newest_marker(self, first: int, last: int) -> int:
        """Return the greatest marker of rows ``[first, last)``; those in holes of the file are not read."""
        newest, start = 0, first
        while start < last:
            try:
                begin = os.lseek(self._file, start * self.record_bytes, os.SEEK_DATA)
                end = os.lseek(self._file, begin, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # no data behind it
                    break
                begin, end = start * self.record_bytes, last * self.record_bytes
            start = max(start, begin // self.record_bytes)
            stop = min(last, start + _ROWS_AT_ONCE, -(-end // self.record_bytes))
            if start < stop:
                newest = max(newest, int(self.read(torch.arange(start, stop), {}).max()))
            start = max(stop, start)
        return newest

    def _transfer(self, write: bool, rows: Tensor, markers: Tensor, tensors: Tensors) -> None:
        assert _native is not None
        columns = self.columns.each if tensors else ()
        parts = [(markers, MARKER_BYTES), *((tensors[column.name], column.bytes) for column in columns)]
        rows = rows.contiguous()
        assert all(each.is_contiguous() and len(each) == len(rows) for each, _ in parts)
        fields = [(each.data_ptr(), size) for each, size in parts]
        error = _native.transfer_records(
            write, self._file, self.record_bytes, rows.data_ptr(), len(rows), fields, _THREADS
        )
        if error != 0:
            what = "written" if write else "read"
            raise StoreError(f"{self.path} cannot be {what}: {os.strerror(error)}")

    def sync(self) -> None:
        """Put what was written on disk."""
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)
