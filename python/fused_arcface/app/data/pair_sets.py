"""What is evaluated, read from files: images, and pairs of them or whom they show.

A set of pairs is insightface's ``.bin``, a text file of pairs (LFW's, or paths), or made from labeled images.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fused_arcface.base.reading import file_errors, open_regular
from fused_arcface.base.text import lines
from fused_arcface.evaluation.pairs import Pairs, balanced_pairs

from . import DataError, ImageError, ImageSource, ImageSpec, open_source, read_image
from .folders import SUFFIXES, read_folder
from .images import MAX_PIXELS
from .pickled_pairs import read_pickled_pairs
from .sources import FolderImages

Read = Callable[[int, ImageSpec], Tensor]


@dataclass(frozen=True)
class ImageSet:
    """M images, and what is known of them."""

    paths: list[str]
    """(M,) what each is called in messages and in saved embeddings."""
    read: Read
    """From a number and what a net takes to an image ``(channels, size, size)`` fp32 in [-1, 1]."""
    labels: Tensor | None = None
    """(M,) int64 whom they show."""
    pairs: Pairs | None = None
    names: list[str] = field(default_factory=list)
    """What labels stand for."""
    problems: list[str] = field(default_factory=list)
    """What was found wrong with the images when they were looked for, with its place: they are not among the M."""
    notes: list[str] = field(default_factory=list)
    """What else there is to know of them."""

    def __len__(self) -> int:
        return len(self.paths)


def read_labeled(data: str, *, max_pixels: int = MAX_PIXELS) -> ImageSet:
    """Labeled images: a folder of one folder for each identity, a ``.rec`` file, or what else
    :func:`fused_arcface.app.data.open_source` knows. Images have at most ``max_pixels``.

    Raises:
        DataError: nothing of the kind.

    >>> people = read_labeled("identities:3x2")
    >>> people.labels, people.read(0, ImageSpec(size=16, channels=1)).shape
    (tensor([0, 0, 1, 1, 2, 2]), torch.Size([1, 16, 16]))
    """
    path = Path(data)
    if path.is_dir() and not (path / "train.rec").is_file():
        folder = read_folder(path)
        images = FolderImages(folder, max_pixels)
        return replace(_of_source(images, data), paths=[str(file) for file, _ in folder.files])
    return _of_source(open_source(data, max_pixels), data)


def _of_source(source: ImageSource, name: str) -> ImageSet:
    paths = [f"{name}[{index}]" for index in range(len(source))]
    return ImageSet(paths, source.read, source.labels, names=source.names, problems=source.problems, notes=source.notes)


def read_pair_set(
    data: str,
    images: str | Path | None = None,
    *,
    most: int = 20_000,
    seed: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> ImageSet:
    """A set of pairs: a ``.bin`` file, a ``.txt``, ``.csv`` or ``.tsv`` file of pairs, or labeled images.

    Args:
        data: which.
        images: folder that a file of pairs names images in; the file's own if None.
        most: pairs of each kind that are made from labeled images at most.
        seed: of their choice.
        max_pixels: of an image, see :func:`fused_arcface.app.data.read_image`.

    Raises:
        DataError: the file or folder is not what it should be; the message names the place.

    >>> read_pair_set("identities:4x2").pairs.same.sum()
    tensor(4)
    """
    path = Path(data)
    if path.suffix.lower() == ".bin":
        return _of_pickle(path, max_pixels)
    if path.suffix.lower() in (".txt", ".csv", ".tsv"):
        return read_pairs_file(path, Path(images) if images is not None else path.parent, max_pixels)
    return _with_pairs(read_labeled(data, max_pixels=max_pixels), data, most, seed)


def paired(source: ImageSource, name: str, *, most: int = 20_000, seed: int = 0) -> ImageSet:
    """A set of pairs made from a source of images; see :func:`read_pair_set`. ``name`` is what messages call it.

    >>> len(paired(open_source("identities:4x2"), "people").pairs.same)
    8
    """
    return _with_pairs(_of_source(source, name), name, most, seed)


def _with_pairs(labeled: ImageSet, name: str, most: int, seed: int) -> ImageSet:
    assert labeled.labels is not None
    try:
        return replace(labeled, pairs=balanced_pairs(labeled.labels, most, seed))
    except ValueError as error:
        raise DataError(f"{name}: no pairs can be made: {error}") from None


def _of_pickle(path: Path, max_pixels: int) -> ImageSet:
    found = read_pickled_pairs(path)
    numbers = torch.arange(len(found.images))
    names = [f"{path.name}[{i}]" for i in range(len(found.images))]
    pairs = Pairs(numbers[0::2], numbers[1::2], torch.tensor(found.same))
    return ImageSet(names, partial(_read_pickled, path.name, found.images, max_pixels), pairs=pairs)


def _read_pickled(name: str, images: Sequence[bytes], max_pixels: int, index: int, spec: ImageSpec) -> Tensor:
    try:
        return read_image(images[index], spec, max_pixels)
    except ImageError as error:
        raise ImageError(f"{name}[{index}]: {error}") from None


def _read_file(files: Sequence[Path], max_pixels: int, index: int, spec: ImageSpec) -> Tensor:
    return read_image(files[index], spec, max_pixels)


def read_pairs_file(path: Path, root: Path, max_pixels: int = MAX_PIXELS) -> ImageSet:
    """A text file of pairs, one a line, with spaces, tabs or commas between.

    ``name 1 4`` is images 1 and 4 of one person, ``name 1 other 2`` of two, at ``name/name_0001.jpg`` below ``root``
    (any image's suffix); ``path1 path2 label`` names files, label 1 for one person and 0 for two. LFW's heading,
    ``10 300``, is passed over, as are empty lines. Folds are consecutive parts of the file.

    A pair with an image that is missing is left out, and is one of the set's problems.

    Raises:
        DataError: a line that is none of these, with its number; or no pair whose images are there.
    """
    with open_regular(path) as file, file_errors(path):
        text = lines(file.read())
    number_of: dict[Path, int] = {}
    folders: dict[Path, dict[str, Path]] = {}
    first, second, same, problems = [], [], [], []
    for number, line in enumerate(text, start=1):
        fields = _fields(line)
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
        [str(file) for file in files], partial(_read_file, files, max_pixels), pairs=pairs, problems=problems
    )


def _fields(line: str) -> list[str]:
    separator = next((each for each in ("\t", ",") if each in line), " ")
    # Spaces alone: str.strip() would take other characters away, which stand in names.
    return [field.strip(" ") for field in line.split(separator) if field.strip(" ")]


def _pair(fields: list[str], root: Path, folders: dict[Path, dict[str, Path]]) -> tuple[Path, Path, bool]:
    """Files and kind of a line.

    Raises:
        ValueError: it is none.
        FileNotFoundError: a file is missing; its text is the file's name.
    """
    if len(fields) == 3 and _is_number(fields[1]) and _is_number(fields[2]):
        one, two = (_lfw_image(root, fields[0], number, folders) for number in fields[1:])
        return one, two, True
    if len(fields) == 4 and _is_number(fields[1]) and _is_number(fields[3]):
        one, two = (_lfw_image(root, fields[at], fields[at + 1], folders) for at in (0, 2))
        return one, two, False
    if len(fields) == 3 and fields[2] in ("0", "1"):
        return _existing(root / fields[0]), _existing(root / fields[1]), fields[2] == "1"
    shown = " ".join(fields)
    raise ValueError(f"must be `name n m`, `name n name m` or `path path 0|1`; got {shown[:100]!r}")


def _is_number(text: str) -> bool:
    return re.fullmatch("[0-9]{1,9}", text) is not None


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
        raise FileNotFoundError(str(path))
    return path
