"""Images that the package makes or ships: ``identities``, ``identities:IDSxIMAGES`` and ``digits``."""

from __future__ import annotations

import re
from pathlib import Path

from fused_arcface.base.reading import NoSuchData

from ..digits import TRAINED, UNSEEN, digit_images
from ..identities import identity_images
from ..sources import MemoryImages

NAMES = ("identities", "digits")
"""Names of the data, for suggestions."""
_IDENTITIES = (200, 10)


def is_identities(data: str) -> bool:
    """Return whether a text asks for generated identities; a file of that name comes first."""
    return data.partition(":")[0] == "identities" and not Path(data).exists()


def open_identities(data: str, _: int) -> MemoryImages:
    """Open generated identities, 200 with 10 images each unless the text says how many.

    Raises:
        NoSuchData: if the text is not of the form ``identities:IDSxIMAGES``.
    """
    identities, images = _counts(data)
    return MemoryImages(identity_images(identities, images))


def unseen_identities(data: str) -> MemoryImages:
    """Open identities that :func:`open_identities` does not give: half as many, at least 4 with 4 images each."""
    identities, images = _counts(data)
    return MemoryImages(identity_images(max(4, identities // 2), max(4, images), first=identities))


def is_digits(data: str) -> bool:
    """Return whether a text asks for scikit-learn's digits; a file of that name comes first."""
    return data == "digits" and not Path(data).exists()


def open_digits(_: str, __: int) -> MemoryImages:
    """Open the digits 0 to 6."""
    return MemoryImages(digit_images(TRAINED))


def unseen_digits(_: str) -> MemoryImages:
    """Open the digits 7 to 9."""
    return MemoryImages(digit_images(UNSEEN))


def _counts(data: str) -> tuple[int, int]:
    """Return the number of identities and of images of each that ``identities[:IDSxIMAGES]`` asks for."""
    found = re.fullmatch("identities(?::([1-9][0-9]*)x([1-9][0-9]*))?", data)
    if found is None:
        raise NoSuchData(f"generated images are identities:IDSxIMAGES, identities:200x10 for example; got {data!r}")
    return (int(found[1]), int(found[2])) if found[1] else _IDENTITIES
