"""Formats of data sets: one row for each, and the functions that choose among them by what a user has written.

A new format is a module here that opens it, and a row in :data:`FORMATS`. Embeddings in files have a table of their
own, in :mod:`fused_arcface.app.data.formats.embeddings`.
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
    """A format of data sets. What it cannot give is None."""

    described: str
    """A phrase for messages: ``"a .rec file"``."""
    matches: Callable[[str], bool]
    """Return whether a text names data in this format."""
    open: Callable[[str, int], ImageSource] | None = None
    """Open labeled images, from the text and the most pixels that an image may have."""
    open_pairs: PairsOpener | None = None
    """Open pairs, from the text, the folder of the images that it names, and the most pixels."""
    unseen: Callable[[str], ImageSource] | None = None
    """Open images of other people, to verify on, that :attr:`open` does not give."""


FORMATS = (
    Format("a .bin set", pickled_pairs.is_pickle, open_pairs=pickled_pairs.open_pickle),
    Format("a text file of pairs", pairs_text.is_text, open_pairs=pairs_text.open_pairs),
    Format("a folder", folders.is_folder, folders.open_folder),
    Format("a list file (.txt, .csv, .tsv, .lst, .list)", lists.is_list, lists.open_list),
    Format("a .rec file", records.is_records, records.open_records),
    Format(
        "identities, identities:IDSxIMAGES",
        generated.is_identities,
        generated.open_identities,
        unseen=generated.unseen_identities,
    ),
    Format("digits", generated.is_digits, generated.open_digits, unseen=generated.unseen_digits),
)
"""The first one counts that matches and gives what is wanted."""


def open_source(data: str, max_pixels: int = MAX_PIXELS) -> ImageSource:
    """Open the labeled images that a text names.

    Args:
        data: a folder of one folder for each identity; a list file of lines ``path label``; a ``.rec`` file, or a
            folder with ``train.rec`` in it;
            ``identities`` or ``identities:200x10`` for generated ones (200 identities with 10 images each);
            ``digits`` for scikit-learn's.
        max_pixels: of an image in a file, see :func:`fused_arcface.app.data.read_image`.

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
        raise NoSuchData(f"data must be {labeled_formats()}; got an empty text")
    for each in FORMATS:
        if each.open is not None and each.matches(data):
            return each.open(data, max_pixels)
    if Path(data).exists():
        raise NoSuchData(f"data must be {labeled_formats()}; got {data}")
    missing = missing_path(data)
    if "did you mean" not in missing:
        missing += did_you_mean(data.partition(":")[0], generated.NAMES) or f"; data must be {labeled_formats()}"
    raise NoSuchData(missing)


def labeled_formats() -> str:
    """Return the formats of labeled images in words, for messages."""
    *most, last = [each.described for each in FORMATS if each.open is not None]
    return f"{', '.join(most)} or {last}"


def pairs_opener(data: str) -> PairsOpener | None:
    """Return the function that opens ``data`` as a file of pairs; None if no format of pairs matches."""
    return next((each.open_pairs for each in FORMATS if each.open_pairs is not None and each.matches(data)), None)


def unseen_source(data: str) -> ImageSource | None:
    """Open other people than those that :func:`open_source` gives, to verify on; None for files."""
    return next((each.unseen(data) for each in FORMATS if each.unseen is not None and each.matches(data)), None)
