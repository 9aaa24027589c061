"""List files: a line ``path label`` for each image. The label is a name or a number."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from fused_arcface.base.reading import DataError, read_lines

from ..images import MAX_PIXELS
from ..sources import FileImages
from .folders import numbered
from .pairs_text import TEXTS, fields_of

SUFFIXES = (*TEXTS, ".lst", ".list")
_SAID = 20  # problems that are told one by one


def open_list(data: str, max_pixels: int = MAX_PIXELS) -> FileImages:
    """Open a list file.

    Tabs, commas or spaces separate the two fields. In a line with spaces alone, the last space separates them, so that
    paths may hold spaces. :func:`listed_images` describes how the fields are used.

    Raises:
        DataError: if a line is not ``path label`` (the message has its number), or if no image is there.
    """
    return listed_images(Path(data), _entries(Path(data)), max_pixels)


def listed_images(path: Path, entries: Iterable[tuple[int, str, str]], max_pixels: int = MAX_PIXELS) -> FileImages:
    """Return the images that a file names.

    Paths are relative to the file's folder. Identities are in the order of their labels, numbers by value. Missing
    images are problems, and so are images that are named again.

    Args:
        path: file that names the images.
        entries: number of the line, path and label of each image.
        max_pixels: limit for an image, see :func:`fused_arcface.app.data.read_image`.

    Raises:
        DataError: if no image is there.
    """
    label_of: dict[Path, str] = {}
    problems: list[str] = []
    for number, name, label in entries:
        image = path.parent / name
        if image in label_of:
            problems.append(f"{path}, line {number}: {image} is named again")
        elif not os.path.isfile(image):
            problems.append(f"{path}, line {number}: {image} is missing")
        else:
            label_of[image] = label
    if not label_of:
        raise DataError(f"{path} names no image that is there{f': {problems[0]}' if problems else ''}")
    if (unsaid := len(problems) - _SAID) > 0:
        problems[_SAID:] = [f"{path}: {unsaid} more lines are not used"]
    names, identities = numbered(label_of.values())
    files = sorted(zip(label_of, identities, strict=True), key=lambda each: each[1])
    return FileImages(files, names, problems, [], max_pixels)


def _entries(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield the number, the path and the label of each line that is not empty."""
    for number, line in read_lines(path):
        fields = fields_of(line)
        if not fields:
            continue
        if "\t" not in line and "," not in line:
            fields = [each for each in line.strip(" ").rsplit(" ", 1) if each]
        if len(fields) != 2:
            raise DataError(f"{path}, line {number}: must be `path label`; got {line[:100]!r}")
        yield number, fields[0].strip(" "), fields[1]
