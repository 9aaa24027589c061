"""A labelled folder: one folder for each identity, in it its images. What ``train``, ``verify`` and ``identify`` read
when they are given a directory."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from ..reading import DataError

SUFFIXES = (
    *(".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tga", ".tif", ".tiff", ".webp"),
)
"""What the names of images end in, in small letters; other files are left alone."""


@dataclass(frozen=True)
class LabelledFolder:
    """Images of a folder and whom they show."""

    root: Path
    files: list[tuple[Path, int]]
    """(path, identity): identities from 0 on without gaps, in the order of ``names``; an identity's images together,
    by name."""
    names: list[str]
    """Folder of each identity."""
    problems: list[str] = field(default_factory=list)
    """What was found beside well-formed identities: empty folders, gaps in numbered ones, images outside any."""

    @property
    def num_identities(self) -> int:
        return len(self.names)


def read_folder(root: str | Path) -> LabelledFolder:
    """The images of a folder whose sub-folders are identities, found but not opened.

    Sub-folders are identities in the order of their names, numbered ones (``0``, ``1``, ``10``) by number; images lie
    in them at any depth. Hidden files and folders are left out. A folder without images is no identity; it is a
    problem, as are missing numbers among numbered folders: identities count on without a gap.

    Raises:
        DataError: not a folder, or no image in any sub-folder.

    >>> import tempfile; root = Path(tempfile.mkdtemp())
    >>> for name in ("ann/1.png", "ann/2.png", "bob/1.png"):
    ...     (root / name).parent.mkdir(exist_ok=True); (root / name).touch()
    >>> [(path.name, identity) for path, identity in read_folder(root).files]
    [('1.png', 0), ('2.png', 0), ('1.png', 1)]
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    entries = [path for path in root.iterdir() if not path.name.startswith(".")]
    folders = sorted((path for path in entries if path.is_dir()), key=lambda path: _natural(path.name))
    loose = sorted(path for path in entries if _is_image(path))
    problems = [f"{loose[0]}: {len(loose)} image(s) outside any identity's folder"] if loose else []
    files: list[tuple[Path, int]] = []
    names: list[str] = []
    for folder in folders:
        images = sorted(path for path in folder.rglob("*") if _is_image(path) and not _hidden(path, folder))
        if not images:
            problems.append(f"{folder}: an identity without images")
            continue
        files += [(path, len(names)) for path in images]
        names.append(folder.name)
    if not files:
        raise DataError(f"{root} has no images: it must hold a folder for each identity, with its images in it")
    return LabelledFolder(root, files, names, problems + _gaps(root, folders))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _natural(name: str) -> tuple[int, int, str]:
    """Numbers by value and before names."""
    return (0, int(name), name) if re.fullmatch("[0-9]+", name) else (1, 0, name)


def _gaps(root: Path, folders: list[Path]) -> list[str]:
    numbers = [int(folder.name) for folder in folders if re.fullmatch("[0-9]+", folder.name)]
    if len(numbers) < len(folders):
        return []
    # Numbered from anything on: the first number is no gap.
    return [
        f"{root}: no folder {missing_numbers(before, after)} between {before} and {after}"
        for before, after in pairwise(numbers)
        if after > before + 1
    ]


def missing_numbers(before: int, after: int) -> str:
    """The whole numbers between two, in words: ``3``, or ``3 to 7``."""
    return str(before + 1) if after == before + 2 else f"{before + 1} to {after - 1}"
