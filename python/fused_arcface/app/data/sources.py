"""Images with what is known of them, whatever file or format they come from: sources to train on, sets to evaluate.

:mod:`fused_arcface.app.data.formats` opens them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_arcface.evaluation.pairs import Pairs

from .images import MAX_PIXELS, ImageSpec, LabeledImages, image_spec, read_image

_PROBED = 16  # images looked at to tell what the others are like


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


class FileImages:
    """Images that are files of their own, as an :class:`ImageSource`.

    Args:
        files: (path, identity) of each image, identities from 0 on without gaps.
        names: of the identities.
        problems: see :class:`ImageSource`.
        notes: see :class:`ImageSource`.
        max_pixels: of an image, see :func:`fused_arcface.app.data.read_image`.
    """

    def __init__(
        self,
        files: list[tuple[Path, int]],
        names: list[str],
        problems: list[str],
        notes: list[str],
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.paths = [path for path, _ in files]
        self.labels = torch.tensor([identity for _, identity in files])
        self.names, self.problems, self.notes = names, problems, notes
        self._max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int, spec: ImageSpec) -> Tensor:
        return read_image(self.paths[index], spec, self._max_pixels)

    def stored(self, index: int) -> bytes:
        return self.paths[index].read_bytes()

    def spec_of(self, index: int) -> ImageSpec:
        return image_spec(self.paths[index], self._max_pixels)


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


Read = Callable[[int, ImageSpec], Tensor]


@dataclass(frozen=True)
class ImageSet:
    """M images, and what is known of them."""

    paths: list[str]
    """(M,) what each is called in messages and in saved embeddings."""
    read: Read
    """From a number and what a net takes to an image ``(channels, size, size)`` fp32 in [-1, 1]."""
    labels: Tensor | None = None
    """(M,) int64 whom they show."""
    pairs: Pairs | None = None
    names: list[str] = field(default_factory=list)
    """What labels stand for."""
    problems: list[str] = field(default_factory=list)
    """What was found wrong with the images when they were looked for, with its place: they are not among the M."""
    notes: list[str] = field(default_factory=list)
    """What else there is to know of them."""

    def __len__(self) -> int:
        return len(self.paths)


def set_of(source: ImageSource, name: str) -> ImageSet:
    """Return a source's images as a set; ``name`` is what messages call those that are not files of their own."""
    own = source.paths if isinstance(source, FileImages) else None
    paths = [f"{name}[{index}]" for index in range(len(source))] if own is None else [str(path) for path in own]
    return ImageSet(paths, source.read, source.labels, names=source.names, problems=source.problems, notes=source.notes)


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
