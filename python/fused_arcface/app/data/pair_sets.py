"""Sets of images to evaluate a net with: labeled ones, and pairs, which a file names or which are made of labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fused_arcface.base.reading import DataError
from fused_arcface.evaluation.pairs import balanced_pairs

from . import formats
from .images import MAX_PIXELS
from .sources import ImageSet, set_of


def read_labeled(data: str, *, max_pixels: int = MAX_PIXELS) -> ImageSet:
    """Open labeled images as :func:`fused_arcface.app.data.formats.open_source` does, for an evaluation.

    >>> from fused_arcface.app.data import ImageSpec
    >>> people = read_labeled("identities:3x2")
    >>> people.labels, people.read(0, ImageSpec(size=16, channels=1)).shape
    (tensor([0, 0, 1, 1, 2, 2]), torch.Size([1, 16, 16]))
    """
    return set_of(formats.open_source(data, max_pixels), data)


def read_pair_set(
    data: str,
    images: str | Path | None = None,
    *,
    most: int = 20_000,
    seed: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> ImageSet:
    """Open a set of pairs: a ``.bin`` file, a ``.txt``, ``.csv`` or ``.tsv`` file of pairs, or labeled images.

    Args:
        data: the name of the file, the folder or the generated images.
        images: folder that a file of pairs names images in; the file's own if None.
        most: pairs of each kind that are made from labeled images at most.
        seed: seed of their choice.
        max_pixels: limit for an image, see :func:`fused_arcface.app.data.read_image`.

    Raises:
        DataError: if the file or folder is not what it should be; the message names the place.

    >>> read_pair_set("identities:4x2").pairs.same.sum()
    tensor(4)
    """
    if (opened := formats.pairs_opener(data)) is not None:
        return opened(data, Path(images) if images is not None else None, max_pixels)
    return paired(read_labeled(data, max_pixels=max_pixels), data, most, seed)


def paired(labeled: ImageSet, name: str, most: int = 20_000, seed: int = 0) -> ImageSet:
    """Make pairs of labeled images; see :func:`read_pair_set`. ``name`` is the name of the set in messages."""
    assert labeled.labels is not None
    try:
        return replace(labeled, pairs=balanced_pairs(labeled.labels, most, seed))
    except ValueError as error:
        raise DataError(f"{name}: no pairs can be made: {error}") from None
