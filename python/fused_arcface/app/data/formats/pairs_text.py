"""Text files of pairs: LFW's ``pairs.txt``, and lines of ``path path 0|1``."""

from __future__ import annotations

import contextlib
import csv
import os
from functools import partial
from pathlib import Path

import torch

from fused_arcface.base.reading import DataError, read_lines
from fused_arcface.base.text import is_whole
from fused_arcface.evaluation.pairs import Pairs

from ..image_formats import SUFFIXES
from ..sources import ImageSet, read_file

TEXTS = (".txt", ".csv", ".tsv")


def open_pairs(data: str, images: Path | None, max_pixels: int) -> ImageSet:
    """Open a text file of pairs, one a line, with spaces, tabs or commas between the fields.

    A line has one of these forms. Paths are relative to the folder ``images``, or to the file's own if it is None.

    - ``name 1 4``: images 1 and 4 of one person, at ``name/name_0001.jpg`` and so on, with any image's suffix;
    - ``name 1 other 2``: images of two people;
    - ``path1 path2 label``: files, label 1 for one person and 0 for two.

    LFW's heading, ``10 300``, and empty lines are skipped. Folds are consecutive parts of the file. A pair with a
    missing image is left out, and is one of the set's problems.

    Raises:
        DataError: if a line is none of these, with its number; or if no pair has its images.
    """
    path = Path(data)
    root = path.parent if images is None else images
    number_of: dict[Path, int] = {}
    folders: dict[Path, dict[str, Path]] = {}
    first, second, same, problems = [], [], [], []
    for number, line in read_lines(path):
        fields = fields_of(line)
        if not fields or (number == 1 and len(fields) <= 2 and all(field.isdigit() for field in fields)):
            continue
        try:
            one, two, label = _pair(fields, root, folders)
        except FileNotFoundError as error:
            problems.append(f"{path}, line {number}: {error} is missing")
            continue
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
        first.append(number_of.setdefault(one, len(number_of)))
        second.append(number_of.setdefault(two, len(number_of)))
        same.append(label)
    if not same:
        raise DataError(f"{path} has no pairs whose images are there{f': {problems[0]}' if problems else ''}")
    files = list(number_of)
    pairs = Pairs(torch.tensor(first), torch.tensor(second), torch.tensor(same))
    return ImageSet(
        [str(file) for file in files], partial(read_file, files, max_pixels), pairs=pairs, problems=problems
    )


def fields_of(line: str) -> list[str]:
    """Return the fields of a line, which tabs, commas or spaces separate, in this order of preference.

    Fields between tabs or commas may be in quotation marks, as in CSV.

    >>> fields_of('"a, b.jpg",Ann')
    ['a, b.jpg', 'Ann']
    """
    separator = next((each for each in ("\t", ",") if each in line), " ")
    if separator != " " and any(field.lstrip(" ").startswith('"') for field in line.split(separator)):
        with contextlib.suppress(csv.Error):  # raised for a field that is too long; its marks then stay
            quoted = next(csv.reader([line], delimiter=separator, skipinitialspace=True))
            return [field.strip(" ") for field in quoted if field.strip(" ")]
    # Only spaces: str.strip() would also remove characters that occur in names.
    return [field.strip(" ") for field in line.split(separator) if field.strip(" ")]


def _pair(fields: list[str], root: Path, folders: dict[Path, dict[str, Path]]) -> tuple[Path, Path, bool]:
    """Return the two files of a line and whether they show one person.

    A FileNotFoundError has the name of the missing file as its text.
    """
    if len(fields) == 3 and is_whole(fields[1], 9) and is_whole(fields[2], 9):
        one, two = (_lfw_image(root, fields[0], number, folders) for number in fields[1:])
        return one, two, True
    if len(fields) == 4 and is_whole(fields[1], 9) and is_whole(fields[3], 9):
        one, two = (_lfw_image(root, fields[at], fields[at + 1], folders) for at in (0, 2))
        return one, two, False
    if len(fields) == 3 and fields[2] in ("0", "1"):
        return _existing(root / fields[0]), _existing(root / fields[1]), fields[2] == "1"
    shown = " ".join(fields)
    raise ValueError(f"must be `name n m`, `name n name m` or `path path 0|1`; got {shown[:100]!r}")


def _lfw_image(root: Path, name: str, number: str, folders: dict[Path, dict[str, Path]]) -> Path:
    """Find the image of a person by its number, with any suffix of an image; ``folders`` keeps what was listed."""
    folder = root / name
    stem = f"{name}_{int(number):04d}"
    usual = folder / f"{stem}.jpg"
    if os.path.isfile(usual):
        return usual
    if folder not in folders:
        folders[folder] = _images_by_stem(folder)
    return folders[folder].get(stem) or _existing(usual)


def _images_by_stem(folder: Path) -> dict[str, Path]:
    try:
        names = sorted(os.listdir(folder), reverse=True)
    except (OSError, ValueError):
        return {}
    images = (folder / name for name in names if os.path.splitext(name)[1].lower() in SUFFIXES)
    return {image.stem: image for image in images if os.path.isfile(image)}


def _existing(path: Path) -> Path:
    if not os.path.isfile(path):
        raise FileNotFoundError(str(path)[:1000])
    return path
