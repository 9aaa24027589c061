"""Verification sets as insightface ships them: ``lfw.bin`` and its like, a pickle of ``(encoded images, is same)``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_arcface.base.pickles import Damaged, Refused
from fused_arcface.base.reading import DataError, check_regular, file_errors, open_regular
from fused_arcface.evaluation.pairs import Pairs

from ..images import ImageSpec, naming, read_image
from ..sources import ImageSet
from .pickle_reader import Array, Latin1, read_set


class PickledPairs(NamedTuple):
    """P pairs."""

    images: list[bytes | Latin1]
    """2·P encoded images, as the file has them; ``bytes(image)`` is the image. Pair i is of images 2·i and 2·i + 1."""
    same: list[bool]
    """P: true if both show one person."""


def read_pickled_pairs(path: str | Path) -> PickledPairs:
    """Read a ``.bin`` verification set, of any pickle protocol, Python 2's too.

    Images are bytes or uint8 arrays ``(n,)``, ``(n, 1)`` or ``(1, n)`` in a list, a tuple or an array of objects;
    labels are bools or 0 and 1 in a list, a tuple, or an array of bools or integers. Nothing of the file is executed,
    and memory grows with its size alone; see :mod:`fused_arcface.app.data.formats.pickle_reader`.

    Raises:
        DataError: if it cannot be read, is damaged, or holds something else.

    >>> import pickle, tempfile
    >>> file = Path(tempfile.mkdtemp()) / "two.bin"
    >>> _ = file.write_bytes(pickle.dumps(([b"jpeg", b"jpeg"], [True])))
    >>> read_pickled_pairs(file).same
    [True]
    """
    path = Path(path)
    size = check_regular(path)
    with open_regular(path) as file, file_errors(path):
        try:
            found = read_set(file, size)
        except Refused as refused:
            raise DataError(f"{path} is refused: {refused}; nothing of it was executed") from None
        except Damaged as damaged:
            raise DataError(f"{path} is not a pickle file, or it is damaged: {damaged}") from None
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise DataError(f"{path} must hold (images, is same); it holds {_kind(found)}")
    images, same = found
    if isinstance(images, Array) and isinstance(images.content, list):
        images = images.content
    labels = isinstance(same, (list, tuple)) or (
        isinstance(same, Array) and len(same.shape) == 1 and same.element.kind != "O"
    )
    if not isinstance(images, (list, tuple)) or not labels:
        raise DataError(f"{path} must hold two lists, images and is same; it holds {' and '.join(map(_kind, found))}")
    pairs = same.shape[0] if isinstance(same, Array) else len(same)
    if len(images) != 2 * pairs or pairs == 0:
        raise DataError(f"{path} must hold two images a pair; it holds {len(images)} and {pairs} pairs")
    flags = same.numbers().tolist() if isinstance(same, Array) else same
    return PickledPairs(
        [_image(path, index, image) for index, image in enumerate(images)],
        [_flag(path, index, flag) for index, flag in enumerate(flags)],
    )


def open_pickle(data: str, _: Path | None, max_pixels: int) -> ImageSet:
    """Open a ``.bin`` set of images with at most ``max_pixels`` each."""
    path = Path(data)
    found = read_pickled_pairs(path)
    numbers = torch.arange(len(found.images))
    names = [f"{path.name}[{i}]" for i in range(len(found.images))]
    pairs = Pairs(numbers[0::2], numbers[1::2], torch.tensor(found.same))
    return ImageSet(names, partial(_read_pickled, path.name, found.images, max_pixels), pairs=pairs)


def _read_pickled(name: str, images: list[bytes | Latin1], max_pixels: int, index: int, spec: ImageSpec) -> Tensor:
    with naming(f"{name}[{index}]"):
        return read_image(bytes(images[index]), spec, max_pixels)


def _image(path: Path, index: int, image: Any) -> bytes | Latin1:
    if isinstance(image, Array) and image.element.code == "u1" and (len(image.shape) == 1 or 1 in image.shape):
        image = image.content
    if not isinstance(image, bytes | Latin1):
        raise DataError(f"{path}: image {index} must be bytes or a uint8 array (n,), (n, 1) or (1, n); {_is(image)}")
    return image


def _flag(path: Path, index: int, flag: Any) -> bool:
    if not isinstance(flag, int) or flag not in (0, 1):
        raise DataError(f"{path}: is same {index} must be a bool; {_is(flag)}")
    return bool(flag)


def _is(value: Any) -> str:
    return f"it is {value if isinstance(value, int) else _kind(value)}"


def _kind(value: Any) -> str:
    if isinstance(value, Array):
        return f"an array {value.shape} of {'objects' if value.element.kind == 'O' else value.element.code}"
    return "bytes" if isinstance(value, Latin1) else type(value).__name__
