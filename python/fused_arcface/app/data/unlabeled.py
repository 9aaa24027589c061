"""Images to embed, whatever is known of them: folders of any depth, lists, single files, RecordIO, in one set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from fused_arcface.base.reading import DataError, NoSuchData, file_errors, read_bytes
from fused_arcface.base.suggest import missing_path
from fused_arcface.base.text import lines

from .formats.folders import is_folder, numbered
from .image_formats import SUFFIXES
from .images import MAX_PIXELS
from .pair_sets import read_labeled
from .sources import ImageSet, read_file

_LISTS = (".txt", ".lst", ".list")
_MOST_BYTES = 1 << 30
"""Largest size of a list of images."""


def read_images(sources: Sequence[str], *, max_pixels: int = MAX_PIXELS) -> ImageSet:
    """Return the images that are named, in the order of their names.

    Args:
        sources: each one is an image; a list, a ``.txt`` or ``.lst`` file with a path on each line, relative to the
            list's folder, and a label behind it or not; a folder, in which images lie at any depth; or one source of
            labeled images, see :func:`fused_arcface.app.data.pair_sets.read_labeled`.
        max_pixels: limit for an image, see :func:`fused_arcface.app.data.read_image`.

    Returns:
        A set with labels if a single source gives them: a folder of one folder for each identity, a list with labels,
        or RecordIO.

    Raises:
        DataError: if nothing has that name, or it has no image.

    >>> read_images(["identities:3x2"]).labels
    tensor([0, 0, 1, 1, 2, 2])
    """
    if not sources:
        raise DataError("images must be given: a folder, a list, or image files")
    if len(sources) == 1 and (labeled := _labeled(sources[0], max_pixels)) is not None:
        return labeled
    problems: list[str] = []
    found = [each for source in sources for each in _files_of(source, problems)]
    files, texts = [file for file, _ in found], [label for _, label in found]
    labels = None
    names: list[str] = []
    if len(sources) == 1 and None not in texts:
        names, numbers = numbered([text for text in texts if text is not None])
        labels = torch.tensor(numbers)
    paths = [str(file) for file in files]
    return ImageSet(paths, partial(read_file, files, max_pixels), labels, names=names, problems=problems)


def _labeled(source: str, max_pixels: int) -> ImageSet | None:
    """Return labeled images, None if the source is images alone."""
    path = Path(source)
    if is_folder(source):
        # Images beside the identities' folders are embedded as well, and then nobody is labeled.
        if any(file.suffix.lower() in SUFFIXES for file in path.iterdir() if file.is_file()):
            return None
        try:
            return read_labeled(source, max_pixels=max_pixels)
        except DataError:  # a flat one
            return None
    return None if path.suffix.lower() in (*SUFFIXES, *_LISTS) else read_labeled(source, max_pixels=max_pixels)


def _files_of(source: str, problems: list[str]) -> list[tuple[Path, str | None]]:
    """Return the files of a source with their labels; add to ``problems`` what is not used of it."""
    path = Path(source)
    if path.is_dir():
        found, links = [], []
        for place, folders, files in os.walk(path):
            links += [Path(place) / name for name in folders if (Path(place) / name).is_symlink()]
            found += [Path(place) / name for name in files if Path(name).suffix.lower() in SUFFIXES and name[0] != "."]
        found.sort()
        if links:
            problems.append(f"{min(links)}: {len(links)} link(s) to folders, which are not followed")
        if not found:
            raise DataError(f"{path} has no images, at any depth")
        return [(file, None) for file in found]
    if path.suffix.lower() in _LISTS:
        return _read_list(path)
    if not path.is_file():
        raise NoSuchData(missing_path(source))
    return [(path, None)]


def _read_list(path: Path) -> list[tuple[Path, str | None]]:
    """Read a list: on each line a path, and a label behind a tab, or behind a blank where the whole line is no file."""
    content = read_bytes(path, _MOST_BYTES)
    found: list[tuple[Path, str | None]] = []
    with file_errors(path):
        for line in lines(content):
            if not (line := line.strip()):
                continue
            name, tab, label = line.rpartition("\t")
            if not tab and not (path.parent / line).is_file():
                name, tab, label = line.rpartition(" ")
            found.append((path.parent / name.strip(), label.strip()) if tab else (path.parent / line, None))
    if not found:
        raise DataError(f"{path} must have a path on each line; it is empty")
    return found
