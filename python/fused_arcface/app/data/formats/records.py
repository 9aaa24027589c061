"""Labeled images of a RecordIO file, the form in which insightface's data sets are distributed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fused_arcface.base.reading import DataError

from ..images import MAX_PIXELS, ImageError, ImageSpec, image_spec, read_image
from .folders import missing_numbers
from .record_index import Heads, Ints, read_heads, read_index, unnamed_ranges
from .recordio import (
    FIRST,
    HEAD_BYTES,
    MOST_BROKEN,
    ImageRecord,
    RecordError,
    RecordFile,
    begins_as_record,
    too_broken,
    unpack_image,
)

_SAID = 20  # problems of one kind that are told one by one
_SAID_OF_THE_REST = 3  # those of records behind a file's end


def is_records(data: str) -> bool:
    """Return whether a name is that of a RecordIO file, or of a folder with ``train.rec`` in it.

    A file with another suffix than ``.rec`` must begin as a record does.
    """
    path = Path(data)
    if not path.is_file():
        return (path / "train.rec").is_file()
    return path.suffix.lower() == ".rec" or begins_as_record(path)


def open_records(data: str, max_pixels: int) -> RecordImages:
    """Open the images of a RecordIO file, each with at most ``max_pixels``."""
    path = Path(data)
    return RecordImages(path if path.is_file() else path / "train.rec", max_pixels)


class RecordImages:
    """The images of a ``.rec`` file. See :class:`fused_arcface.app.data.sources.ImageSource`.

    With a ``train.idx`` beside it, a record's number is its key there. Without one the file is scanned, and records are
    numbered from 0. A first record without an image but with labels is a header, as in insightface's files: its first
    label ends the images, and ranges of identities follow. A record's first label is its identity. The labels are
    numbered from 0 on without gaps; ``names`` has those of the file.

    Args:
        path: the ``.rec`` file.
        max_pixels: limit for an image, see :func:`fused_arcface.app.data.read_image`.

    Raises:
        DataError: if it cannot be opened, has no image that can be used, or its index is of another kind.
    """

    def __init__(self, path: str | Path, max_pixels: int = MAX_PIXELS) -> None:
        self.path, self._max_pixels = Path(path), max_pixels
        self._file = RecordFile(self.path)
        self.problems: list[str] = []
        self.notes: list[str] = []
        numbers, heads = self._without_header(*self._find_records())
        numbers, offsets, found = self._read_labels(numbers, heads)
        if len(found) == 0:
            first = f"; {self.problems[0]}" if self.problems else ""
            raise DataError(f"{self.path} has no record of an image{first}")
        classes, first_rows, labels = np.unique(found, return_index=True, return_inverse=True)
        self._numbers, self._offsets = numbers, offsets
        self.labels: Tensor = torch.from_numpy(labels.reshape(-1).astype(np.int64))
        self.names = [str(each) for each in classes]
        self._report_gaps(classes, first_rows)

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, index: int, spec: ImageSpec) -> Tensor:
        with self._naming(index):
            return read_image(self.stored(index), spec, self._max_pixels)

    def stored(self, index: int) -> bytes:
        return self._record(self._numbers[index], self._offsets[index]).image

    def spec_of(self, index: int) -> ImageSpec:
        with self._naming(index):
            return image_spec(self.stored(index), self._max_pixels)

    @contextlib.contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        """Name the record of an image in the errors of a block."""
        try:
            yield
        except ImageError as error:
            place = _place(self.path, self._numbers[index], self._offsets[index])
            raise ImageError(f"{place}: {error}") from None

    def _record(self, number: np.int64, offset: np.int64) -> ImageRecord:
        payload = self._file.read(int(offset), int(number))
        try:
            return unpack_image(payload)
        except ValueError as error:
            raise RecordError(f"{_place(self.path, number, offset)}: {error}") from None

    def _find_records(self) -> tuple[Ints, Heads]:
        """Return number and head of each record, in the order of the numbers."""
        index = self.path.with_suffix(".idx")
        if not index.exists():
            found = list(self._file.scan())
            self.notes.append(f"{index} is missing: {self.path.name} was scanned, its records are numbered from 0")
            self._report([str(each) for each in found if isinstance(each, RecordError)])
            offsets = np.array([-1 if isinstance(each, RecordError) else each for each in found], np.int64)
            numbers = np.flatnonzero(offsets >= 0)
            return numbers, read_heads(self._file, offsets[numbers])
        keys, offsets = read_index(index, self._file.size // HEAD_BYTES)
        if len(unwritten := keys[offsets < 0]):
            self.problems.append(
                f"{index}: {len(unwritten)} records are not used: it has no offset for them, as key {unwritten[0]}"
            )
        keys, offsets = keys[offsets >= 0], offsets[offsets >= 0]
        heads = read_heads(self._file, offsets)
        self._report_unnamed(index, heads)
        # The last line of a key counts, as for MXNet.
        numbers, last = np.unique(keys[::-1], return_index=True)
        last = len(keys) - 1 - last
        used, places = np.unique(offsets[last], return_index=True)
        if unused := len(np.setdiff1d(offsets, used)):
            repeated = np.sort(keys)[:-1][np.diff(np.sort(keys)) == 0][0]
            self.problems.append(
                f"{index}: {unused} records are not used: another line has the same key, as key {repeated}"
            )
        if twice := len(last) - len(used):
            self.problems.append(f"{index}: {twice} keys are not used: their record has another key as well")
        places = np.sort(places)
        return numbers[places], heads[last[places]]

    def _report(self, problems: list[str], more: int = 0) -> None:
        """Note records that cannot be read: the first ones in words, the number of the others and of ``more``."""
        said = problems[: _SAID + _SAID_OF_THE_REST]
        self.problems += said
        if unsaid := len(problems) - len(said) + more:
            self.problems.append(f"{self.path}: {unsaid} more records cannot be read")

    def _report_unnamed(self, index: Path, heads: Heads) -> None:
        """Note records that the index does not name."""
        found = [
            offset
            for start, stop in unnamed_ranges(heads, self._file.size)
            for offset in self._file.scan(start, stop)
            if not isinstance(offset, RecordError)
        ]
        if found:
            self.problems.append(
                f"{self.path}: {len(found)} records are not used: {index.name} does not name them; "
                f"the first is at byte {found[0]}"
            )

    def _without_header(self, numbers: Ints, heads: Heads) -> tuple[Ints, Heads]:
        """Return the records that are images, as the header says if there is one."""
        if len(numbers) == 0 or numbers[0] != 0:
            return numbers, heads
        try:
            labels, _, image = unpack_image(self._file.read(int(heads.offsets[0]), 0))
        except ValueError:
            return numbers, heads  # reported with the labels
        if image or len(labels) < 2:
            return numbers, heads
        place = _place(self.path, 0, heads.offsets[0])
        if not 1 <= labels[0] < 2**53:
            self.problems.append(f"{place}: the header must say where the images end; got {labels[0]:g}")
            return numbers[1:], heads[np.arange(1, len(numbers))]
        end = int(labels[0])
        images = (numbers > 0) & (numbers < end)
        if images.sum() < end - 1:
            self.problems.append(f"{place}: the header says {end - 1} images, the index has {images.sum()}")
        if behind := int((heads.has_image & (numbers >= end)).sum()):
            self.problems.append(f"{place}: {behind} images are not used: the header says that images end before {end}")
        return numbers[images], heads[images]

    def _read_labels(self, numbers: Ints, heads: Heads) -> tuple[Ints, Ints, Ints]:
        """Return number, offset and first label of the records that can be read."""
        labels, good = heads.label.copy(), heads.complete.copy()
        # Each of these may have parts all over the file, or share them with others.
        limit = self._file.bytes_read + self._file.size
        broken = []
        for row in np.flatnonzero(heads.part == FIRST):
            try:
                labels[row] = self._record(numbers[row], heads.offsets[row]).labels[0]
                good[row] = True
            except DataError as error:
                broken.append((row, str(error)))
            if self._file.bytes_read > limit or len(broken) > MOST_BROKEN:
                raise too_broken(self.path)
        rest = np.flatnonzero(~good & (heads.part != FIRST))
        # In a truncated file all records of the rest have the same problem.
        behind = heads.offsets[rest] > self._file.size - HEAD_BYTES
        for row in (*rest[behind][:_SAID_OF_THE_REST], *rest[~behind][:_SAID]):
            try:
                self._record(numbers[row], heads.offsets[row])
            except DataError as error:
                broken.append((row, str(error)))
        self._report([text for _, text in sorted(broken)], max(0, int((~behind).sum()) - _SAID))
        if (unsaid := int(behind.sum()) - _SAID_OF_THE_REST) > 0:
            self.problems.append(f"{self.path}: {unsaid} more records cannot be read for the same reason")
        whole = good & (labels >= 0) & (labels == np.floor(labels)) & (labels < 2**53)
        wrong = np.flatnonzero(good & ~whole)
        for row in wrong[:_SAID]:
            place = _place(self.path, numbers[row], heads.offsets[row])
            self.problems.append(f"{place}: its label must be a whole number >= 0; got {labels[row]:g}")
        if len(wrong) > _SAID:
            self.problems.append(f"{self.path}: {len(wrong) - _SAID} more records have an invalid label")
        return numbers[whole], heads.offsets[whole], labels[whole].astype(np.int64)

    def _report_gaps(self, classes: Ints, first_rows: Ints) -> None:
        """Note labels that no record has, for labels (L,) in order and the first row (L,) of each."""
        before = np.r_[-1, classes[:-1]]
        gaps = np.flatnonzero(classes > before + 1)
        for gap in gaps[:_SAID]:
            row, missing = first_rows[gap], missing_numbers(int(before[gap]), int(classes[gap]))
            place = _place(self.path, self._numbers[row], self._offsets[row])
            self.problems.append(f"{place} is the first with label {classes[gap]}: none has label {missing}")
        if len(gaps) > _SAID:
            self.problems.append(f"{self.path}: labels are missing at {len(gaps) - _SAID} more places")


def _place(path: Path, number: int | np.int64, offset: int | np.int64) -> str:
    return f"{path}: record {number} at byte {offset}"
