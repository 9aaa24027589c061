"""Formats of data sets: one row for each, and the functions that choose among them by what a user has written.

A new format is a module here that opens it, and a row in :data:`FORMATS`. Messages, the help of the commands and the
lists in ``docs/`` follow from the rows. Embeddings in files have a table of their own, in
:mod:`fused_arcface.app.data.formats.embeddings`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fused_arcface.base.reading import NoSuchData
from fused_arcface.base.suggest import did_you_mean, missing_path

from ..images import MAX_PIXELS
from ..sources import ImageSet, ImageSource
from . import folders, generated, lists, pairs_text, pickled_pairs, records

PairsOpener = Callable[[str, Path | None, int], ImageSet]


@dataclass(frozen=True)
class Format:
    """A format of data sets. A function that it does not have is None."""

    described: str
    """A phrase for messages and help texts: ``"a .rec file"``."""
    details: str
    """Text about the format in the documentation, in Markdown."""
    matches: Callable[[str], bool]
    """Return whether a text names data in this format."""
    open: Callable[[str, int], ImageSource] | None = None
    """Open labeled images, from the text and the most pixels that an image may have."""
    open_pairs: PairsOpener | None = None
    """Open pairs, from the text, the folder of the images that it names, and the most pixels."""
    unseen: Callable[[str], ImageSource] | None = None
    """Open images of other people, to verify on, that :attr:`open` does not give."""


def _files(*suffixes: str) -> Callable[[str], bool]:
    """Return the function that matches the names of files with these suffixes."""
    return lambda data: Path(data).suffix.lower() in suffixes


FORMATS = (
    Format(
        "a .bin set",
        "insightface's packed pairs of images; nothing in the file is executed",
        _files(".bin"),
        open_pairs=pickled_pairs.open_pickle,
    ),
    Format(
        "a .txt, .csv or .tsv file of pairs",
        "LFW's `pairs.txt`, or a line `path path 0|1` for each pair",
        _files(*pairs_text.TEXTS),
        open_pairs=pairs_text.open_pairs,
    ),
    Format(
        "a folder with one folder for each identity",
        "images of any size and mode",
        folders.is_folder,
        folders.read_folder,
    ),
    Format(
        "a list file (.lst, .list, .txt, .csv, .tsv)",
        "a line `path label` for each image. Paths are relative to the list's folder. A label is a name or a number. "
        "Fields between commas or tabs may be in quotation marks, as in CSV",
        _files(*lists.SUFFIXES),
        lists.open_list,
    ),
    Format(
        "a .rec file",
        "RecordIO with images, with or without an `.idx` file, or a folder with `train.rec`; mxnet is not needed",
        records.is_records,
        records.open_records,
    ),
    Format(
        "identities, identities:IDSxIMAGES",
        "`identities:500x10` makes images of 500 identities, 10 of each",
        generated.is_identities,
        generated.open_identities,
        unseen=generated.unseen_identities,
    ),
    Format(
        "digits",
        "scikit-learn's handwritten digits",
        generated.is_digits,
        generated.open_digits,
        unseen=generated.unseen_digits,
    ),
)
"""The first format that matches, and can open what is asked for, is taken."""


def open_source(data: str, max_pixels: int = MAX_PIXELS) -> ImageSource:
    """Open the labeled images that a text names.

    Args:
        data: the name of a file or a folder, or of generated images, in one of :data:`FORMATS`.
        max_pixels: limit for an image in a file, see :func:`fused_arcface.app.data.read_image`.

    Raises:
        NoSuchData: if nothing has that name.
        DataError: if there is nothing to train on in it.
        MissingExtra: if scikit-learn is needed and not installed.

    >>> from fused_arcface.app.data import ImageSpec
    >>> source = open_source("identities:3x2")
    >>> len(source), source.read(0, ImageSpec(size=8, channels=3)).shape
    (6, torch.Size([3, 8, 8]))
    """
    if not data:
        raise NoSuchData(f"data must be {listed()}; got an empty text")
    for each in FORMATS:
        if each.open is not None and each.matches(data):
            return each.open(data, max_pixels)
    if Path(data).exists():
        raise NoSuchData(f"data must be {listed()}; got {data}")
    missing = missing_path(data)
    if "did you mean" not in missing:
        missing += did_you_mean(data.partition(":")[0], generated.NAMES) or f"; data must be {listed()}"
    raise NoSuchData(missing)


def _of(pairs: bool) -> list[Format]:
    """Return the formats of pairs, or those of labeled images."""
    return [each for each in FORMATS if (each.open_pairs if pairs else each.open) is not None]


def listed(pairs: bool = False) -> str:
    """Return the formats of labeled images, or of pairs, in words, for messages and help texts."""
    *most, last = [each.described for each in _of(pairs)]
    return f"{', '.join(most)} or {last}"


def as_markdown(pairs: bool = False) -> str:
    """Return the list of the formats of labeled images, or of pairs, in ``docs/``."""
    return "".join(f"- {each.described}: {each.details};\n" for each in _of(pairs)).removesuffix(";\n") + ".\n"


def pairs_opener(data: str) -> PairsOpener | None:
    """Return the function that opens ``data`` as a file of pairs; None if no format of pairs matches."""
    return next((each.open_pairs for each in FORMATS if each.open_pairs is not None and each.matches(data)), None)


def unseen_source(data: str) -> ImageSource | None:
    """Open other people than those that :func:`open_source` gives, to verify on; None for files."""
    return next((each.unseen(data) for each in FORMATS if each.unseen is not None and each.matches(data)), None)
