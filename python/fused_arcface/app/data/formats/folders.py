"""A labeled folder: one folder for each identity, with its images in it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from fused_arcface.base.reading import DataError, file_errors
from fused_arcface.base.text import is_whole

from ..image_formats import SUFFIXES
from ..images import MAX_PIXELS
from ..sources import FileImages

SPLITS = frozenset(
    ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "gallery", "probe", "probes")
)
"""Names of folders that hold parts of a data set, not one person."""


class LabeledFolder(FileImages):
    """Images of a folder and whom they show, an identity's images together, by name.

    Its problems are images that are not used, and other faults: empty folders, gaps in the numbers of folders, images
    outside of any folder, broken links, and identities with several folders of images. Its notes have the number of the
    other files.
    """

    root: Path

    @property
    def files(self) -> list[tuple[Path, int]]:
        """(path, identity) of each image."""
        return list(zip(self.paths, self.labels.tolist(), strict=True))

    @property
    def num_identities(self) -> int:
        return len(self.names)


def is_folder(data: str) -> bool:
    """Return whether a name is that of a folder without ``train.rec``."""
    path = Path(data)
    return path.is_dir() and not (path / "train.rec").is_file()


def read_folder(root: str | Path, max_pixels: int = MAX_PIXELS) -> LabeledFolder:
    """Find the images of a folder whose sub-folders are identities; none is opened.

    Sub-folders are identities in the order of their names, numbered ones (``0``, ``1``, ``10``) by number; images lie
    in them at any depth. Hidden files and folders are not used, nor links to folders inside an identity's. A folder
    without images is a problem and no identity. Missing numbers among numbered folders are problems as well; the
    identities have no gap there.

    Raises:
        DataError: if it is not a folder, no sub-folder has an image, or the sub-folders are parts of a data set, such
            as ``train`` and ``val``, and the identities are in those.

    >>> import tempfile; root = Path(tempfile.mkdtemp())
    >>> for name in ("ann/1.png", "ann/2.png", "bob/1.png"):
    ...     (root / name).parent.mkdir(exist_ok=True); (root / name).touch()
    >>> [(path.name, identity) for path, identity in read_folder(root).files]
    [('1.png', 0), ('2.png', 0), ('1.png', 1)]
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    with file_errors(root):
        entries = [path for path in root.iterdir() if not path.name.startswith(".")]
    folders = sorted((path for path in entries if path.is_dir()), key=lambda path: natural(path.name))
    loose = sorted(path for path in entries if _named_as_image(path.name) and not path.is_dir())
    problems = [f"{loose[0]}: {len(loose)} image(s) outside any identity's folder"] if loose else []
    contents = [_Content(folder) for folder in folders]
    problems += [f"{each.folder}: an identity without images" for each in contents if not each.images]
    identities = [each for each in contents if each.images]
    if not identities:
        there = f"{len(loose)} image(s) but no folders of images" if loose else "no images"
        raise DataError(f"{root} has {there}: it must hold a folder for each identity, with its images in it")
    names = [each.folder.name for each in identities]
    nested = [each for each in identities if each.is_nested]
    if len(nested) == len(names) and SPLITS.issuperset(name.lower() for name in names):
        raise DataError(f"{root} holds {' and '.join(names)}, which hold the identities: name one of them")
    if nested:
        problems.append(
            f"{root}: {len(nested)} of {len(names)} identities have their images in several folders of their own, as "
            f"{nested[0].images[0].parent}: each folder of {root} counts as one identity"
        )
    unreachable = sorted(path for path in entries if not os.path.exists(path) and not _named_as_image(path.name))
    unreachable += [path for each in contents for path in each.unreachable]
    if unreachable:
        problems.append(f"{unreachable[0]}: {len(unreachable)} image(s) or folder(s) that cannot be read or followed")
    others = [path for each in contents for path in each.others]
    notes = [f"{others[0]}: {len(others)} file(s) that are no images by their name; not used"] if others else []
    files = [(path, identity) for identity, each in enumerate(identities) for path in each.images]
    found = LabeledFolder(files, names, problems + _gaps(root, folders), notes, max_pixels)
    found.root = root
    return found


class _Content:
    """The content of the folder of one identity."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images: list[Path] = []
        self.unreachable: list[Path] = []
        """Links to nothing, pipes and devices with an image's name; folders that cannot be read; links to folders."""
        self.others: list[Path] = []
        for place, folders, files in os.walk(folder, onerror=self._failed):
            parent = Path(place)
            self.unreachable += [parent / name for name in folders if (parent / name).is_symlink()]
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in files:
                path = parent / name
                if name.startswith(".") or not _named_as_image(name):
                    self.others.append(path)
                elif path.is_file():
                    self.images.append(path)
                else:
                    self.unreachable.append(path)
        self.images.sort(key=_by_bytes)

    def _failed(self, error: OSError) -> None:
        self.unreachable.append(Path(os.fsdecode(error.filename)))

    @property
    def is_nested(self) -> bool:
        """True if the images lie in more than one folder, all of them below this one."""
        parents = {path.parent for path in self.images}
        return len(parents) > 1 and self.folder not in parents


def _named_as_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _by_bytes(path: Path) -> list[bytes]:
    return os.fsencode(path).split(os.fsencode(os.sep))


def natural(name: str) -> tuple[int, int, bytes]:
    """Return a key that sorts numbers by value, then names by their bytes: the same in every locale."""
    return (0, int(name), b"") if is_whole(name) else (1, 0, os.fsencode(name))


def numbered(labels: Iterable[str]) -> tuple[list[str], list[int]]:
    """Return the names of the identities in order, and the place among them of each label.

    >>> numbered(["bob", "10", "9", "bob"])
    (['9', '10', 'bob'], [2, 1, 0, 2])
    """
    listed = list(labels)
    names = sorted(set(listed), key=lambda name: (natural(name), name))
    place_of = {name: place for place, name in enumerate(names)}
    return names, [place_of[label] for label in listed]


def _gaps(root: Path, folders: list[Path]) -> list[str]:
    numbers = [int(folder.name) for folder in folders if is_whole(folder.name)]
    if len(numbers) < len(folders):
        return []
    # The first number may be any: it is no gap.
    return [
        f"{root}: no folder {missing_numbers(before, after)} between {before} and {after}"
        for before, after in pairwise(numbers)
        if after > before + 1
    ]


def missing_numbers(before: int, after: int) -> str:
    """Return the whole numbers between two, in words: ``3``, or ``3 to 7``."""
    return str(before + 1) if after == before + 2 else f"{before + 1} to {after - 1}"
