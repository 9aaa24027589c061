"""What is evaluated, read from files: images, and pairs of them or whom they show.

A set of pairs is insightface's ``.bin``, a text file of pairs (LFW's, or paths), or made from labelled images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..data import DataError, ImageError, ImageSource, ImageSpec, open_source, read_image
from ..data.folders import SUFFIXES, read_folder
from ..data.images import MAX_PIXELS
from ..data.pickled_pairs import read_pickled_pairs
from ..data.sources import FolderImages
from ..text import lines
from .pairs import Pairs, balanced_pairs

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
    """What was found wrong with labelled images when they were opened, with its place: they are not among the M."""

    def __len__(self) -> int:
        return len(self.paths)


def read_labelled(data: str, *, max_pixels: int = MAX_PIXELS) -> ImageSet:
    """Labelled images: a folder of one folder for each identity, a ``.rec`` file, or what else
    :func:`fused_arcface.data.open_source` knows. Images have at most ``max_pixels``.

    Raises:
        DataError: nothing of the kind.

    >>> people = read_labelled("identities:3x2")
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
    return ImageSet(paths, source.read, source.labels, names=source.names, problems=source.problems)


def read_pair_set(
    data: str,
    images: str | Path | None = None,
    *,
    most: int = 20_000,
    seed: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> ImageSet:
    """A set of pairs: a ``.bin`` file, a ``.txt``, ``.csv`` or ``.tsv`` file of pairs, or labelled images.

    Args:
        data: which.
        images: folder that a file of pairs names images in; the file's own if None.
        most: pairs of each kind that are made from labelled images at most.
        seed: of their choice.
        max_pixels: of an image, see :func:`fused_arcface.data.read_image`.

    Raises:
        DataError: the file or folder is not what it should be; the message names the place.

    >>> read_pair_set("identities:4x2").pairs.same.sum()
    tensor(4)
    """
    path = Path(data)
    if path.suffix.lower() == ".bin":
        if not path.is_file():
            raise DataError(f"{path} is not a file")
        return _of_pickle(path, max_pixels)
    if path.suffix.lower() in (".txt", ".csv", ".tsv"):
        return read_pairs_file(path, Path(images) if images is not None else path.parent, max_pixels)
    return _with_pairs(read_labelled(data, max_pixels=max_pixels), data, most, seed)


def paired(source: ImageSource, name: str, *, most: int = 20_000, seed: int = 0) -> ImageSet:
    """A set of pairs made from a source of images; see :func:`read_pair_set`. ``name`` is what messages call it.

    >>> len(paired(open_source("identities:4x2"), "people").pairs.same)
    8
    """
    return _with_pairs(_of_source(source, name), name, most, seed)


def _with_pairs(labelled: ImageSet, name: str, most: int, seed: int) -> ImageSet:
    assert labelled.labels is not None
    try:
        return replace(labelled, pairs=balanced_pairs(labelled.labels, most, seed))
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

    Raises:
        DataError: a line that is none of these, an image that is missing, or no pairs of one kind; with the line.
    """
    try:
        text = lines(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    number_of: dict[Path, int] = {}
    first, second, same = [], [], []
    for number, line in enumerate(text, start=1):
        fields = _fields(line)
        if not fields or (number == 1 and len(fields) <= 2 and all(field.isdigit() for field in fields)):
            continue
        try:
            one, two, label = _pair(fields, root)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
        first.append(number_of.setdefault(one, len(number_of)))
        second.append(number_of.setdefault(two, len(number_of)))
        same.append(label)
    if not any(same) or all(same):
        raise DataError(f"{path} must hold pairs of one person and of two; it has {sum(same)} of {len(same)} pairs")
    files = list(number_of)
    pairs = Pairs(torch.tensor(first), torch.tensor(second), torch.tensor(same))
    return ImageSet([str(file) for file in files], partial(_read_file, files, max_pixels), pairs=pairs)


def _fields(line: str) -> list[str]:
    separator = next((each for each in ("\t", ",") if each in line), " ")
    # Spaces alone: str.strip() would take other characters away, which stand in names.
    return [field.strip(" ") for field in line.split(separator) if field.strip(" ")]


def _pair(fields: list[str], root: Path) -> tuple[Path, Path, bool]:
    """Files and kind of a line.

    Raises:
        ValueError: it is none, or a file is missing.
    """
    if len(fields) == 3 and fields[1].isdigit() and fields[2].isdigit():
        return _lfw_image(root, fields[0], fields[1]), _lfw_image(root, fields[0], fields[2]), True
    if len(fields) == 4 and fields[1].isdigit() and fields[3].isdigit():
        return _lfw_image(root, fields[0], fields[1]), _lfw_image(root, fields[2], fields[3]), False
    if len(fields) == 3 and fields[2] in ("0", "1"):
        return _existing(root / fields[0]), _existing(root / fields[1]), fields[2] == "1"
    raise ValueError(f"must be `name n m`, `name n name m` or `path path 0|1`; got {' '.join(fields)!r}")


def _lfw_image(root: Path, name: str, number: str) -> Path:
    stem = root / name / f"{name}_{int(number):04d}"
    usual = stem.with_name(stem.name + ".jpg")
    if usual.is_file():
        return usual
    others = [path for path in (stem.with_name(stem.name + suffix) for suffix in sorted(SUFFIXES)) if path.is_file()]
    return others[0] if others else _existing(usual)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    return path
