"""Labelled images of a RecordIO file, as insightface's data sets are distributed: which records are images, and whom
each shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..reading import DataError
from .folders import missing_numbers
from .images import ImageError, ImageSpec, image_spec, read_image
from .recordio import (
    HEAD_BYTES,
    IMAGE_HEADER_BYTES,
    MAGIC,
    ImageRecord,
    RecordError,
    RecordFile,
    read_index,
    unpack_image,
)

Ints = npt.NDArray[np.int64]

_SAID_OF_THE_REST = 3  # records behind a file's end that are named one by one


class RecordImages:
    """The images of a ``.rec`` file. See :class:`fused_arcface.data.sources.ImageSource`.

    Where ``train.idx`` stands beside it, a record's number is its key there; else the file is scanned and records are
    numbered from 0. A first record without an image but with labels is a header, as in insightface's files: its first
    label ends the images, and what comes after are ranges of identities. A record's first label is whom it shows; the
    labels found are numbered from 0 on without gaps, ``names`` has those of the file.

    Args:
        path: of the ``.rec``.

    Raises:
        DataError: it cannot be opened, has no image that can be used, or an index that is none.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = RecordFile(self.path)
        except OSError as error:
            raise DataError(f"{self.path} cannot be opened: {error.strerror}") from None
        self.problems: list[str] = []
        self.notes: list[str] = []
        numbers, offsets = self._find_records()
        numbers, offsets = self._without_header(numbers, offsets)
        numbers, offsets, found = self._read_labels(numbers, offsets)
        if len(found) == 0:
            first = f"; {self.problems[0]}" if self.problems else ""
            raise DataError(f"{self.path} has no record of an image{first}")
        classes, labels = np.unique(found, return_inverse=True)
        self._numbers, self._offsets = numbers, offsets
        self.labels: Tensor = torch.from_numpy(labels.reshape(-1).astype(np.int64))
        self.names = [str(each) for each in classes]
        self._report_gaps(classes, found)

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, index: int, spec: ImageSpec) -> Tensor:
        """See :meth:`fused_arcface.data.sources.ImageSource.read`."""
        try:
            return read_image(self._record(index).image, spec)
        except ImageError as error:
            raise ImageError(f"{self._place(index)}: {error}") from None

    def spec_of(self, index: int) -> ImageSpec:
        """See :meth:`fused_arcface.data.sources.ImageSource.spec_of`."""
        try:
            return image_spec(self._record(index).image)
        except ImageError as error:
            raise ImageError(f"{self._place(index)}: {error}") from None

    def _record(self, index: int) -> ImageRecord:
        payload = self._file.read(int(self._offsets[index]), int(self._numbers[index]))
        try:
            return unpack_image(payload)
        except ValueError as error:
            raise RecordError(f"{self._place(index)}: {error}") from None

    def _place(self, index: int) -> str:
        return _place(self.path, self._numbers[index], self._offsets[index])

    def _find_records(self) -> tuple[Ints, Ints]:
        """Number and offset of each record."""
        index = self.path.with_suffix(".idx")
        if index.is_file():
            offsets = dict(sorted(read_index(index).items()))
            return _ints(offsets), _ints(offsets.values())
        found = list(self._file.scan())
        self.notes.append(f"{index} is missing: {self.path.name} was scanned, its records are numbered from 0")
        self.problems += [str(each) for each in found if isinstance(each, RecordError)]
        records = [(number, each) for number, each in enumerate(found) if not isinstance(each, RecordError)]
        return _ints(number for number, _ in records), _ints(offset for _, offset in records)

    def _without_header(self, numbers: Ints, offsets: Ints) -> tuple[Ints, Ints]:
        """Of the records those that the header, if there is one, says are images."""
        if len(numbers) == 0 or numbers[0] != 0:
            return numbers, offsets
        try:
            labels, _, image = unpack_image(self._file.read(int(offsets[0]), 0))
        except ValueError:
            return numbers, offsets  # reported with the labels
        if image or len(labels) < 2:
            return numbers, offsets
        end = int(labels[0])
        images = (numbers > 0) & (numbers < end)
        if images.sum() < end - 1:
            place = _place(self.path, 0, offsets[0])
            self.problems.append(f"{place}: the header says {end - 1} images, the index has {images.sum()}")
        return numbers[images], offsets[images]

    def _read_labels(self, numbers: Ints, offsets: Ints) -> tuple[Ints, Ints, Ints]:
        """The records that can be read, and the first label of each."""
        labels, plain = _plain_labels(self.path, self._file.size, offsets)
        # Of a truncated file each record of the rest has the same to say.
        behind = np.flatnonzero(offsets > self._file.size - HEAD_BYTES)
        unsaid = behind[_SAID_OF_THE_REST:]
        for row in np.setdiff1d(np.flatnonzero(~plain), unsaid):
            try:
                payload = self._file.read(int(offsets[row]), int(numbers[row]))
                labels[row] = unpack_image(payload).labels[0]
            except RecordError as error:
                self.problems.append(str(error))
            except ValueError as error:
                self.problems.append(f"{_place(self.path, numbers[row], offsets[row])}: {error}")
            else:
                plain[row] = True
        if len(unsaid):
            self.problems.append(f"{self.path}: {len(unsaid)} more records cannot be read for the same reason")
        whole = plain & (labels >= 0) & (labels == np.floor(labels)) & (labels < 2**53)
        for row in np.flatnonzero(plain & ~whole):
            place = _place(self.path, numbers[row], offsets[row])
            self.problems.append(f"{place}: its label must be a whole number >= 0; got {labels[row]:g}")
        return numbers[whole], offsets[whole], labels[whole].astype(np.int64)

    def _report_gaps(self, classes: Ints, found: Ints) -> None:
        for before, after in zip(np.r_[-1, classes[:-1]], classes, strict=True):
            if after > before + 1:
                row = int(np.argmax(found == after))
                self.problems.append(
                    f"{self._place(row)} is the first with label {after}: none has label "
                    f"{missing_numbers(int(before), int(after))}"
                )


def _place(path: Path, number: int | np.int64, offset: int | np.int64) -> str:
    return f"{path}: record {number} at byte {offset}"


def _ints(values: object) -> Ints:
    return np.fromiter(values, dtype=np.int64)  # type: ignore[call-overload]


def _plain_labels(path: Path, size: int, offsets: Ints) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """First label of each record, and where it is one: whole records of images that end within the file. All at once:
    a data set has millions."""
    labels = np.zeros(len(offsets))
    plain = (offsets >= 0) & (offsets % 4 == 0) & (offsets + HEAD_BYTES + IMAGE_HEADER_BYTES <= size)
    rows = np.flatnonzero(plain)
    if len(rows) == 0:
        return labels, plain
    words = np.memmap(path, dtype="<u4", mode="r", shape=(size // 4,))
    at = offsets[rows] // 4
    length, flag = words[at + 1].astype(np.int64), words[at + 2].astype(np.int64)
    needed = IMAGE_HEADER_BYTES + 4 * flag
    # Of a record in parts the kind stands in the length's upper bits, so that it is too long.
    good = (
        (words[at] == MAGIC) & (length >= needed) & (offsets[rows] + HEAD_BYTES + length <= size) & (length < 1 << 29)
    )
    plain[rows] = good
    label_at = np.where(flag > 0, at + (HEAD_BYTES + IMAGE_HEADER_BYTES) // 4, at + 3)[good]
    labels[rows[good]] = words[label_at].view("<f4")
    return labels, plain
