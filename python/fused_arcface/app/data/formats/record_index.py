"""The positions and heads of the records of a RecordIO file, for millions of them at once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from fused_arcface.base.reading import DataError, file_errors, open_regular

from .recordio import HEAD_BYTES, IMAGE_HEADER_BYTES, MAGIC, MOST, WHOLE, RecordFile, padded

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_LINES = re.compile(rb"(?:[ \t]*[0-9]{1,20}[ \t]+[0-9]{1,20}[ \t\r]*\n)*")
_LONGEST_LINE = 100
_BLOCK = 1 << 18


def read_index(path: Path, most: int) -> tuple[Ints, Ints]:
    """Read an ``.idx`` file of at most ``most`` lines: keys and offsets ``(lines,)``, in the file's order.

    An offset beyond int64 is -1: MXNet's im2rec writes 2⁶⁴ - 1 for a record that it could not write.

    Raises:
        DataError: if a line is not ``key <tab> offset``, or there are too many lines.
    """
    keys, offsets, count = [], [], 0
    with open_regular(path) as file, file_errors(path):
        while block := _whole_lines(file):
            if not _LINES.fullmatch(block):
                lines = block.split(b"\n")
                wrong = next(number for number, line in enumerate(lines) if not _LINES.fullmatch(line + b"\n"))
                place, shown = count + 1 + wrong, lines[wrong][:40].decode("utf-8", "replace").strip()
                raise DataError(f"{path}: line {place} must be a key and an offset; got {shown!r}")
            numbers = list(map(int, block.split()))
            keys.append(_clipped(numbers[0::2]))
            offsets.append(_clipped(numbers[1::2]))
            if keys[-1].min() < 0:
                raise DataError(f"{path}: line {count + 1 + int(keys[-1].argmin())} must have a key below 2^63")
            count += len(keys[-1])
            if count > most:
                raise DataError(f"{path} names more records than its .rec file has room for, {most}")
    none = np.empty(0, np.int64)
    return np.concatenate([none, *keys]), np.concatenate([none, *offsets])


def _whole_lines(file: BinaryIO) -> bytes:
    """Read some whole lines. The last line of the file gets an end if it lacks one; a line that is too long is cut."""
    block = file.read(_BLOCK)
    if block and not block.endswith(b"\n"):
        block += file.readline(_LONGEST_LINE)
        block += b"" if block.endswith(b"\n") or file.read(1) else b"\n"
    return block


def _clipped(numbers: list[int]) -> Ints:
    return np.array([number if number < 2**63 else -1 for number in numbers], dtype=np.int64)


@dataclass(frozen=True)
class Heads:
    """The content of the heads of M records, each ``(M,)``."""

    numbers: Ints
    """Keys of the records."""
    offsets: Ints
    part: npt.NDArray[np.int8]
    """Kind of the record's first part; -1 where no record begins, or one that does not end within the file."""
    end: Ints
    """Offset of the next record, for whole records."""
    label: npt.NDArray[np.float64]
    """First label, where ``complete``."""
    complete: Bools
    """Whole records that are long enough for their labels."""
    has_image: Bools
    """Complete ones with bytes behind the labels."""

    def __getitem__(self, rows: npt.NDArray[np.generic]) -> Heads:
        return Heads(*(each[rows] for each in vars(self).values()))


def read_heads(file: RecordFile, numbers: Ints, offsets: Ints) -> Heads:
    """Read the heads of the records ``numbers`` (M,) at ``offsets`` (M,) in a file."""
    count, size = len(offsets), file.size
    part, end = np.full(count, -1, np.int8), np.zeros(count, np.int64)
    label, complete, has_image = np.zeros(count), np.zeros(count, np.bool_), np.zeros(count, np.bool_)
    rows = np.flatnonzero((offsets >= 0) & (offsets % 4 == 0) & (offsets <= size - HEAD_BYTES))
    if len(rows):
        words = np.memmap(file.path, dtype="<u4", mode="r", shape=(size // 4,))
        at = offsets[rows] // 4
        length = (words[at + 1] & MOST).astype(np.int64)
        good = (words[at] == MAGIC) & (offsets[rows] + HEAD_BYTES + length <= size)
        rows, at, length = rows[good], at[good], length[good]
        part[rows] = words[at + 1] >> 29
        end[rows] = offsets[rows] + HEAD_BYTES + (length + 3) // 4 * 4
        whole = (part[rows] == WHOLE) & (length >= IMAGE_HEADER_BYTES)
        rows, at, length = rows[whole], at[whole], length[whole]
        flag = words[at + 2].astype(np.int64)
        needed = IMAGE_HEADER_BYTES + 4 * flag
        long = length >= needed
        rows, at, flag = rows[long], at[long], flag[long]
        complete[rows] = True
        has_image[rows] = (length > needed)[long]
        label[rows] = words[np.where(flag > 0, at + (HEAD_BYTES + IMAGE_HEADER_BYTES) // 4, at + 3)].view("<f4")
    return Heads(numbers, offsets, part, end, label, complete, has_image)


def unnamed_ranges(heads: Heads, size: int) -> list[tuple[int, int]]:
    """Return the byte ranges, first byte and the one after the last, that the records at ``heads`` leave out.

    The range behind a record whose end is unknown (one in parts, or a broken one) is not among them.
    """
    order = np.argsort(heads.offsets, kind="stable")
    starts, ends = heads.offsets[order], heads.end[order]
    known = heads.part[order] == WHOLE
    reached = np.maximum.accumulate(np.r_[0, np.where(known, ends, starts)])
    open_end = np.r_[False, ~known]
    following = np.r_[starts, padded(size)]
    gaps = np.flatnonzero((following > reached) & ~open_end)
    return [(int(reached[gap]), int(min(following[gap], size))) for gap in gaps]
