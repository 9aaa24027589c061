"""Labeled images of a RecordIO file, the form in which insightface's data sets are distributed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fused_arcface.base.reading import DataError

from ..images import MAX_PIXELS, ImageSpec, naming, read_image
from ..sources import ImageSource
from .folders import missing_numbers
from .record_index import Bools, Heads, Ints, read_heads, read_index, unnamed_ranges
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


class RecordImages(ImageSource):
    """The images of a ``.rec`` file.

    With a ``train.idx`` beside it, a record's number is its key there. Without one the file is scanned, and records are
    numbered from 0. A first record without an image but with labels is a header, as in insightface's files: its first
    label ends the images, and ranges of identities follow. A record's first label is its identity. The labels are
    numbered from 0 on without gaps; ``names`` has those of the file.

    Raises:
        DataError: if it cannot be opened, has no image that can be used, or its index is of another kind.
    """

    def __init__(self, path: str | Path, max_pixels: int = MAX_PIXELS) -> None:
        self.path, self.max_pixels = Path(path), max_pixels
        self._file = RecordFile(self.path)
        self.problems, self.notes = [], []
        heads = self._without_header(self._find_records())
        used, found = self._read_labels(heads)
        if len(found) == 0:
            first = f"; {self.problems[0]}" if self.problems else ""
            raise DataError(f"{self.path} has no record of an image{first}")
        classes, first_rows, labels = np.unique(found, return_index=True, return_inverse=True)
        self._numbers, self._offsets = heads.numbers[used], heads.offsets[used]
        self.labels = torch.from_numpy(labels.reshape(-1).astype(np.int64))
        self.names = [str(each) for each in classes]
        self._report_gaps(classes, first_rows)

    def read(self, index: int, spec: ImageSpec) -> Tensor:
        with naming(self._file.place(self._offsets[index], self._numbers[index])):
            return read_image(self.stored(index), spec, self.max_pixels)

    def stored(self, index: int) -> bytes:
        return self._record(self._offsets[index], self._numbers[index]).image

    def _record(self, offset: int, number: int) -> ImageRecord:
        payload = self._file.read(int(offset), int(number))
        try:
            return unpack_image(payload)
        except ValueError as error:
            raise RecordError(f"{self._file.place(offset, number)}: {error}") from None

    def _find_records(self) -> Heads:
        """Return the head of each record, in the order of the numbers."""
        index = self.path.with_suffix(".idx")
        if not index.exists():
            found = list(self._file.scan())
            self.notes.append(f"{index} is missing: {self.path.name} was scanned, its records are numbered from 0")
            broken = [str(each) for each in found if isinstance(each, RecordError)]
            self._report(broken[:_SAID], len(broken) - _SAID, "{} more records cannot be read")
            offsets = np.array([-1 if isinstance(each, RecordError) else each for each in found], np.int64)
            numbers = np.flatnonzero(offsets >= 0)
            return read_heads(self._file, numbers, offsets[numbers])
        keys, offsets = read_index(index, self._file.size // HEAD_BYTES)
        if len(unwritten := keys[offsets < 0]):
            self.problems.append(
                f"{index}: {len(unwritten)} records are not used: it has no offset for them, as key {unwritten[0]}"
            )
        heads = read_heads(self._file, keys[offsets >= 0], offsets[offsets >= 0])
        self._report_unnamed(index, heads)
        # The last line of a key counts, as for MXNet.
        _, last = np.unique(heads.numbers[::-1], return_index=True)
        last = len(heads.numbers) - 1 - last
        used, places = np.unique(heads.offsets[last], return_index=True)
        if unused := len(np.setdiff1d(heads.offsets, used)):
            ordered = np.sort(heads.numbers)
            repeated = ordered[:-1][np.diff(ordered) == 0][0]
            self.problems.append(
                f"{index}: {unused} records are not used: another line has the same key, as key {repeated}"
            )
        if twice := len(last) - len(used):
            self.problems.append(f"{index}: {twice} keys are not used: their record has another key as well")
        return heads[last[np.sort(places)]]

    def _report(self, problems: list[str], others: int, unsaid: str) -> None:
        """Note problems of some records in words, and the number of the others in ``unsaid``."""
        self.problems += problems
        if others > 0:
            self.problems.append(f"{self.path}: {unsaid.format(others)}")

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

    def _without_header(self, heads: Heads) -> Heads:
        """Return the records that are images, as the header says if there is one."""
        numbers = heads.numbers
        if len(numbers) == 0 or numbers[0] != 0:
            return heads
        try:
            labels, _, image = unpack_image(self._file.read(int(heads.offsets[0]), 0))
        except ValueError:
            return heads  # reported with the labels
        if image or len(labels) < 2:
            return heads
        place = self._file.place(heads.offsets[0], 0)
        if not 1 <= labels[0] < 2**53:
            self.problems.append(f"{place}: the header must say where the images end; got {labels[0]:g}")
            return heads[np.arange(1, len(numbers))]
        end = int(labels[0])
        images = (numbers > 0) & (numbers < end)
        if images.sum() < end - 1:
            self.problems.append(f"{place}: the header says {end - 1} images, the index has {images.sum()}")
        if behind := int((heads.has_image & (numbers >= end)).sum()):
            self.problems.append(f"{place}: {behind} images are not used: the header says that images end before {end}")
        return heads[images]

    def _read_labels(self, heads: Heads) -> tuple[Bools, Ints]:
        """Return which of the records (M,) can be used, and the first label of each of those."""
        labels, good = heads.label.copy(), heads.complete.copy()
        # Each of these may have parts all over the file, or share them with others.
        limit, broken = self._file.bytes_read + self._file.size, 0
        for row in np.flatnonzero(heads.part == FIRST):
            try:
                labels[row] = self._record(heads.offsets[row], heads.numbers[row]).labels[0]
                good[row] = True
            except DataError:
                broken += 1
            if self._file.bytes_read > limit or broken > MOST_BROKEN:
                raise too_broken(self.path)
        # In a truncated file all records of the rest have the same problem.
        behind = heads.offsets > self._file.size - HEAD_BYTES
        for rows, most, same in ((~good & ~behind, _SAID, ""), (~good & behind, 3, " for the same reason")):
            problems = self._errors(heads[np.flatnonzero(rows)[:most]])
            self._report(problems, int(rows.sum()) - most, f"{{}} more records cannot be read{same}")
        whole = good & (labels >= 0) & (labels == np.floor(labels)) & (labels < 2**53)
        wrong = np.flatnonzero(good & ~whole)
        problems = [
            f"{self._file.place(heads.offsets[row], heads.numbers[row])}: its label must be a whole number >= 0; got "
            f"{labels[row]:g}"
            for row in wrong[:_SAID]
        ]
        self._report(problems, len(wrong) - _SAID, "{} more records have an invalid label")
        return whole, labels[whole].astype(np.int64)

    def _errors(self, heads: Heads) -> list[str]:
        """Return the errors of reading some records."""
        errors = []
        for offset, number in zip(heads.offsets, heads.numbers, strict=True):
            try:
                self._record(offset, number)
            except DataError as error:
                errors.append(str(error))
        return errors

    def _report_gaps(self, classes: Ints, first_rows: Ints) -> None:
        """Note labels that no record has, for labels (L,) in order and the first row (L,) of each."""
        before = np.r_[-1, classes[:-1]]
        gaps = np.flatnonzero(classes > before + 1)
        problems = []
        for gap in gaps[:_SAID]:
            row, missing = first_rows[gap], missing_numbers(int(before[gap]), int(classes[gap]))
            place = self._file.place(self._offsets[row], self._numbers[row])
            problems.append(f"{place} is the first with label {classes[gap]}: none has label {missing}")
        self._report(problems, len(gaps) - _SAID, "labels are missing at {} more places")
