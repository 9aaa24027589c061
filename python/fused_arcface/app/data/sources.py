"""What can be trained on, opened by one function: a labeled folder, a RecordIO file, images that the package makes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_arcface.base.reading import DataError
from fused_arcface.base.suggest import missing_path

from .digits import TRAINED, UNSEEN, digit_images
from .folders import LabeledFolder, read_folder
from .identities import identity_images
from .images import MAX_PIXELS, ImageSpec, LabeledImages, image_spec, read_image
from .records import RecordImages

_PROBED = 16  # images looked at to tell what the others are like
_IDENTITIES = (200, 10)


class LabeledReader(Protocol):
    """Images that are read one by one, by index, with a label for each; usable in data-loader workers."""

    labels: Tensor
    """(M,) int64."""

    def __len__(self) -> int: ...

    def read(self, index: int, spec: ImageSpec) -> Tensor:
        """Image ``(channels, size, size)`` fp32, about -1 to 1.

        Raises:
            DataError, ImageError: it cannot be read; the message names the place.
        """


class ImageSource(LabeledReader, Protocol):
    """Images to train on: labels go from 0 to the number of identities - 1, each at least once."""

    names: list[str]
    """Of the identities."""
    problems: list[str]
    """What was found wrong when the source was opened, with its place: the images of the source do without it."""
    notes: list[str]
    """What else there is to know of it."""

    def stored(self, index: int) -> bytes:
        """Bytes of an image as it is stored, to tell it from another; of images that the package makes, their shape.

        Raises:
            DataError, ImageError, OSError: they cannot be read.
        """

    def spec_of(self, index: int) -> ImageSpec:
        """Shorter side and channels of an image as it is stored.

        Raises:
            DataError, ImageError: it cannot be read.
        """


class FolderImages:
    """A labeled folder as an :class:`ImageSource`."""

    def __init__(self, folder: LabeledFolder, max_pixels: int = MAX_PIXELS) -> None:
        self._files = [path for path, _ in folder.files]
        self.labels = torch.tensor([identity for _, identity in folder.files])
        self.names, self.problems, self.notes = folder.names, folder.problems, folder.notes
        self._max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int, spec: ImageSpec) -> Tensor:
        return read_image(self._files[index], spec, self._max_pixels)

    def stored(self, index: int) -> bytes:
        return self._files[index].read_bytes()

    def spec_of(self, index: int) -> ImageSpec:
        return image_spec(self._files[index], self._max_pixels)


class MemoryImages:
    """Images in memory, square and gray, as an :class:`ImageSource`."""

    def __init__(self, data: LabeledImages) -> None:
        self._images, self.labels = data
        self.names = [str(identity) for identity in range(data.num_identities)]
        self.problems: list[str] = []
        self.notes: list[str] = []

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int, spec: ImageSpec) -> Tensor:
        image = 2 * self._images[index] - 1
        if image.shape[-1] != spec.size:
            image = F.interpolate(image[None], spec.shape[1:], mode="bilinear", antialias=True)[0]
        return image.expand(spec.shape)

    def stored(self, index: int) -> bytes:
        return str(tuple(self._images[index].shape)).encode()

    def spec_of(self, index: int) -> ImageSpec:
        return ImageSpec(self._images.shape[-1], self._images.shape[1])


def open_source(data: str, max_pixels: int = MAX_PIXELS) -> ImageSource:
    """The images that a text names.

    Args:
        data: a folder of one folder for each identity; a ``.rec`` file, or a folder with ``train.rec`` in it;
            ``identities`` or ``identities:200x10`` for generated ones (200 identities with 10 images each);
            ``digits`` for scikit-learn's.
        max_pixels: of an image in a file, see :func:`fused_arcface.app.data.read_image`.

    Raises:
        DataError: nothing of that name, or nothing to train on in it.
        MissingExtra: scikit-learn is not installed.

    >>> source = open_source("identities:3x2")
    >>> len(source), source.read(0, ImageSpec(size=8, channels=3)).shape
    (6, torch.Size([3, 8, 8]))
    """
    path = Path(data)
    if path.is_dir():
        records = path / "train.rec"
        return RecordImages(records, max_pixels) if records.is_file() else FolderImages(read_folder(path), max_pixels)
    if path.is_file():
        return RecordImages(path, max_pixels)
    if counts := _identity_counts(data):
        return MemoryImages(identity_images(*counts))
    if data == "digits":
        return MemoryImages(digit_images(TRAINED))
    rule = "data must be a folder, a .rec file, identities, identities:IDSxIMAGES or digits"
    raise DataError(f"{rule}; got {data!r}: {missing_path(path)}")


def unseen_source(data: str) -> ImageSource | None:
    """For data that the package makes: others of the kind, to verify on, whom :func:`open_source` does not give; None
    for files."""
    if Path(data).exists():
        return None
    if counts := _identity_counts(data):
        return MemoryImages(identity_images(max(4, counts[0] // 2), max(4, counts[1]), first=counts[0]))
    return MemoryImages(digit_images(UNSEEN))


def _identity_counts(data: str) -> tuple[int, int] | None:
    """Identities and images of each that ``identities[:IDSxIMAGES]`` asks for."""
    found = re.fullmatch("identities(?::([1-9][0-9]*)x([1-9][0-9]*))?", data)
    if found is None:
        return None
    return (int(found[1]), int(found[2])) if found[1] else _IDENTITIES


def common_spec(source: ImageSource, least: int = 32, most: int = 112) -> ImageSpec:
    """What suits a source: gray unless one of the images looked at has color, and their median side within bounds."""
    specs = []
    for index in torch.linspace(0, len(source) - 1, min(_PROBED, len(source))).long().tolist():
        try:
            specs.append(source.spec_of(index))
        except ValueError:  # reported when it is read
            continue
    sizes = sorted(spec.size for spec in specs) or [most]
    size = min(max(sizes[len(sizes) // 2], least), most)
    return ImageSpec(size, max((spec.channels for spec in specs), default=3))
