"""RecordIO, MXNet's file of records, and the images that face data sets keep in it, without mxnet.

A record lies at a multiple of 4 bytes, little-endian::

    uint32 magic 0xced7230a    uint32 (part << 29 | length)    payload    0 to 3 zero bytes

``part`` is 0 for a whole record. A payload with the magic number in one of its aligned words is stored in parts that
end before each such word (1 the first, 2 those between, 3 the last): the word itself is left out, and put back between
the parts on reading.

An image's payload is ``uint32 flag, float32 label, uint64 id, uint64 id2`` and then the image's bytes; with ``flag``
> 0 that many float32 labels stand before the image, and ``label`` counts for nothing. ``train.idx`` has a line
``key <tab> offset`` for each record.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fused_arcface.base.files import replacing
from fused_arcface.base.reading import DataError, open_regular

MAGIC = 0xCED7230A
HEAD_BYTES = 8  # magic and length
WHOLE, FIRST, BETWEEN, LAST = range(4)
MOST = (1 << 29) - 1
"""Largest number of bytes in a part."""
MOST_BROKEN = 10_000
"""Largest number of broken records in a file."""

_HEAD = struct.Struct("<II")
_IMAGE = struct.Struct("<IfQQ")
IMAGE_HEADER_BYTES = _IMAGE.size
_MAGIC_BYTES = struct.pack("<I", MAGIC)
# The magic number before a length whose three highest bits say that the part is a whole record or a first part.
_BEGIN = re.compile(re.escape(_MAGIC_BYTES) + rb"(?=...[\x00-\x3f])", re.DOTALL)
_MOST_LABELS = 1 << 16
_MOST_PARTS = 1000  # an image has the magic number by chance; one of 16 GB would have it once
_WINDOW = 1 << 12  # bytes read at first in the search for the next record


def begins_as_record(path: Path) -> bool:
    """Return whether a regular file begins with a record's first bytes."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC_BYTES)) == _MAGIC_BYTES
    except OSError:
        return False


class RecordError(DataError):
    """A record that cannot be read; the message has the file, the record's number and its offset in bytes."""


class ImageRecord(NamedTuple):
    """An image of a RecordIO file."""

    labels: tuple[float, ...]
    """One, unless the record says how many."""
    id: int
    image: bytes
    """As it was encoded: a JPEG, for example."""


def pack_image(labels: float | Sequence[float], id: int, image: bytes) -> bytes:
    """Return an image's payload. One label is stored in the header, a sequence of labels after it.

    >>> unpack_image(pack_image([3, 0.5], 7, b"jpeg"))
    ImageRecord(labels=(3.0, 0.5), id=7, image=b'jpeg')
    """
    if isinstance(labels, (int, float)):
        return _IMAGE.pack(0, labels, id, 0) + image
    return _IMAGE.pack(len(labels), 0.0, id, 0) + struct.pack(f"<{len(labels)}f", *labels) + image


def unpack_image(payload: bytes) -> ImageRecord:
    """Return the parts of an image's payload, the opposite of :func:`pack_image`.

    Raises:
        ValueError: if it is shorter than its header says, or has more than 65536 labels.

    >>> unpack_image(pack_image(3, 7, b"jpeg")).labels
    (3.0,)
    """
    if len(payload) < _IMAGE.size:
        raise ValueError(f"an image's record must have >= {_IMAGE.size} bytes; got {len(payload)}")
    flag, label, id, _ = _IMAGE.unpack_from(payload)
    if flag == 0:
        return ImageRecord((label,), id, payload[_IMAGE.size :])
    start = _IMAGE.size + 4 * flag
    if flag > _MOST_LABELS:
        raise ValueError(f"a record must have <= {_MOST_LABELS} labels; got {flag}")
    if len(payload) < start:
        raise ValueError(f"a record with {flag} labels must have >= {start} bytes; got {len(payload)}")
    return ImageRecord(struct.unpack_from(f"<{flag}f", payload, _IMAGE.size), id, payload[start:])


class RecordFile:
    """A RecordIO file, read at any offset; usable after a fork, in another process, and from several threads.

    Args:
        path: the ``.rec`` file.

    Raises:
        DataError: if it cannot be opened, or is no regular file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = open_regular(self.path)
        self.size = os.fstat(self._file.fileno()).st_size
        self.bytes_read = 0
        """Bytes of records that :meth:`read` has read."""

    def __reduce__(self) -> tuple[type[RecordFile], tuple[Path]]:
        return RecordFile, (self.path,)  # another process opens the file anew

    def read(self, offset: int, number: int) -> bytes:
        """Return the payload of the record at ``offset``; messages call it by its ``number``.

        Raises:
            RecordError: if there is no record, or it does not end within the file.
        """
        payloads = []
        for start, length in self._parts(offset, number):
            self.bytes_read += HEAD_BYTES + length
            payloads.append(self._read(start, length))
            if len(payloads[-1]) < length:
                raise self._error(start - HEAD_BYTES, number, "the file became shorter")
        return _MAGIC_BYTES.join(payloads)

    def _parts(self, offset: int, number: int) -> Iterator[tuple[int, int]]:
        """Yield the offset and the length of the payload of each part of the record at ``offset``."""
        place = offset
        for count in range(_MOST_PARTS):
            part, length = self._head(place, number)
            if count == 0 and part not in (WHOLE, FIRST):
                raise self._error(offset, number, f"it begins with a part of kind {part}, not with a first one")
            if count > 0 and part not in (BETWEEN, LAST):
                raise self._error(offset, number, "its last part is missing")
            yield place + HEAD_BYTES, length
            if part in (WHOLE, LAST):
                return
            place += HEAD_BYTES + padded(length)
        raise self._error(offset, number, f"it has more than {_MOST_PARTS} parts")

    def _read(self, offset: int, length: int) -> bytes:
        try:
            # pread has no position, which processes would share after a fork.
            return os.pread(self._file.fileno(), length, offset)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read at byte {offset}: {error.strerror}") from None

    def _head(self, offset: int, number: int) -> tuple[int, int]:
        """Return kind and length of the part at ``offset``, which ends within the file."""
        if not 0 <= offset <= self.size - HEAD_BYTES:
            raise self._error(offset, number, f"the file ends at byte {self.size}")
        if offset % 4:
            raise self._error(offset, number, "a record begins at a multiple of 4")
        head = self._read(offset, HEAD_BYTES)
        if len(head) < HEAD_BYTES:
            raise self._error(offset, number, "the file became shorter")
        magic, word = _HEAD.unpack(head)
        if magic != MAGIC:
            raise self._error(offset, number, f"0x{MAGIC:08x} is missing; got 0x{magic:08x}")
        part, length = word >> 29, word & MOST
        if offset + HEAD_BYTES + length > self.size:
            end = offset + HEAD_BYTES + length
            raise self._error(offset, number, f"it must end at byte {end}, the file ends at byte {self.size}")
        return part, length

    def place(self, offset: int, number: int) -> str:
        """Return the place of a record in words."""
        return f"{self.path}: record {number} at byte {offset}"

    def _error(self, offset: int, number: int, why: str) -> RecordError:
        return RecordError(f"{self.place(offset, number)} cannot be read: {why}")

    def scan(self, start: int = 0, stop: int | None = None) -> Iterator[int | RecordError]:
        """Yield the offset of each record from ``start`` to ``stop``, found without an index, in order.

        A :class:`RecordError` comes in place of one that cannot be read. The scan then continues at the next magic
        number.

        Raises:
            DataError: if more than 10,000 records cannot be read: the file is of another kind.
        """
        offset, number, broken = start, 0, 0
        stop = self.size if stop is None else stop
        while offset < stop:
            start = offset
            found: RecordError | None = None
            try:
                for payload, length in self._parts(offset, number):
                    offset = payload + padded(length)
            except RecordError as error:
                found = error
                broken += 1
                if broken > MOST_BROKEN:
                    raise too_broken(self.path) from None
                offset = self._next_magic(max(offset, start + 4), stop)
            yield start if found is None else found
            number += 1

    def _next_magic(self, offset: int, stop: int) -> int:
        """Return the offset of the first record that may begin at ``offset`` or after it; ``stop`` if none does."""
        offset, block = padded(offset), _WINDOW
        while offset < stop:
            for found in _BEGIN.finditer(self._read(offset, block + 4)):
                if found.start() % 4 == 0:
                    return offset + found.start()
            offset += block
            block = min(4 * block, 1 << 20)
        return stop


def too_broken(path: Path) -> DataError:
    """Return the error for a file with too many broken records."""
    return DataError(f"{path} has more than {MOST_BROKEN} records that cannot be read: it is damaged, or another file")


class RecordWriter(contextlib.ExitStack):
    r"""Write a RecordIO file and its index; a context manager. Each appears when it is whole, in place of an old one.

    >>> import tempfile; path = Path(tempfile.mkdtemp()) / "train.rec"
    >>> with RecordWriter(path) as writer:
    ...     writer.write(1, pack_image(0, 1, b"jpeg"))
    >>> RecordFile(path).read(0, 1)[-4:], path.with_suffix(".idx").read_text()
    (b'jpeg', '1\t0\n')
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self._index = self.enter_context(replacing(Path(path).with_suffix(".idx")))
        self._records = self.enter_context(replacing(path))

    def write(self, key: int, payload: bytes) -> None:
        """Append a record."""
        self._index.write(f"{key}\t{self._records.tell()}\n".encode("ascii"))
        parts = _split_at_magic(payload)
        for place, part in enumerate(parts):
            if len(part) > MOST:
                raise ValueError(f"a part of a record must have < 2^29 bytes; got {len(part)}")
            kind = WHOLE if len(parts) == 1 else FIRST if place == 0 else LAST if place == len(parts) - 1 else BETWEEN
            self._records.write(_HEAD.pack(MAGIC, kind << 29 | len(part)) + part + bytes(padded(len(part)) - len(part)))


def _split_at_magic(payload: bytes) -> list[bytes]:
    """Return the parts before, between and after the magic numbers in the payload's aligned words."""
    parts, start = [], 0
    for found in re.finditer(re.escape(_MAGIC_BYTES), payload):
        if found.start() % 4 == 0:
            parts.append(payload[start : found.start()])
            start = found.end()
    return [*parts, payload[start:]]


def padded(length: int) -> int:
    """Return ``length`` rounded up to a multiple of 4."""
    return -(-length // 4) * 4
