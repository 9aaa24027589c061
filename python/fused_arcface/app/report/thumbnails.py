"""Thumbnails of the images in a result, by their names in the result."""

from __future__ import annotations

import io
from collections.abc import Iterable

from torch import Tensor

from fused_arcface.base.extras import MissingExtra, require

from ..data.images import ImageSpec
from ..data.sources import ImageSet, Read
from .document import Thumbnail, data_address

PIXELS = 96
"""Side of a thumbnail: a phone shows two beside each other, and a report of dozens stays small."""


class Thumbnails:
    """Makes thumbnails of the images in some sets.

    Args:
        sets: sets that have the images. The thumbnail of an image in none of them has only the name.

    >>> from ..data.pair_sets import read_labeled
    >>> people = read_labeled("identities:2x2")
    >>> Thumbnails([people])(people.paths[0]).source[:22]
    'data:image/jpeg;base64'
    >>> Thumbnails([])("ann.png")
    Thumbnail(name='ann.png', source='')
    """

    def __init__(self, sets: Iterable[ImageSet]) -> None:
        self._places: dict[str, tuple[Read, int]] = {
            name: (images.read, number) for images in sets for number, name in enumerate(images.paths)
        }

    def __call__(self, name: str) -> Thumbnail:
        """Return the thumbnail of an image; an image that cannot be read has its name alone."""
        if name not in self._places:
            return Thumbnail(name, "")
        read, number = self._places[name]
        try:
            return Thumbnail(name, _as_jpeg(read(number, ImageSpec(PIXELS, 3))))
        except (MissingExtra, OSError, ValueError):
            return Thumbnail(name, "")


def _as_jpeg(image: Tensor) -> str:
    """Return the ``data:`` address of an image ``(3, height, width)`` in [-1, 1]."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    require("PIL.Image", "train").fromarray(pixels).save(file, "jpeg", quality=85)
    return data_address(file.getvalue(), "image/jpeg")
