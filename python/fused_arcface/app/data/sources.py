"""Images of any format with their labels: sources to train on, and sets to evaluate a net with.

:mod:`fused_arcface.app.data.formats` opens them.
"""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_arcface.base.reading import read_bytes
from fused_arcface.evaluation.pairs import Pairs

from .images import MAX_PIXELS, ImageSpec, LabeledImages, image_spec, read_image

_PROBED = 16  # images that stand for all
_MOST_BYTES = 1 << 28
"""Largest size of an image's file. It keeps a sparse file of terabytes from being read."""


class ImageSource(ABC):
    """Labeled images to train on, each read by its index, in data-loader workers too.

    ``read`` and ``stored`` raise DataError or ImageError for an image that cannot be read; the message names the place.
    """

    labels: Tensor
    """(M,) int64, from 0 to the number of identities - 1, each at least once."""
    names: list[str]
    """Names of the identities."""
    problems: list[str]
    """Faults found when the source was opened, with their places. Such images are not part of the source."""
    notes: list[str]
    """Other facts that the user should know."""
    max_pixels: int = MAX_PIXELS
    """Limit for an image, see :func:`fused_arcface.app.data.read_image`."""

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, index: int, spec: ImageSpec) -> Tensor:
        """Return an image ``(channels, size, size)`` fp32, about -1 to 1."""

    @abstractmethod
    def stored(self, index: int) -> bytes:
        """Return bytes that identify an image: those stored, or the shape of one that the package makes."""

    def spec_of(self, index: int) -> ImageSpec:
        """Return shorter side and channels of an image as it is stored; raise DataError if it cannot be read."""
        return image_spec(self.stored(index), self.max_pixels)


class FileImages(ImageSource):
    """Images that are files of their own.

    ``files`` are (path, identity) of each image, with identities from 0 on without gaps.
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
        self.names, self.problems, self.notes, self.max_pixels = names, problems, notes, max_pixels

    def read(self, index: int, spec: ImageSpec) -> Tensor:
        return read_image(self.paths[index], spec, self.max_pixels)

    def stored(self, index: int) -> bytes:
        return read_bytes(self.paths[index], _MOST_BYTES)


class MemoryImages(ImageSource):
    """Images in memory, square and gray."""

    def __init__(self, data: LabeledImages) -> None:
        self._images, self.labels = data
        self.names = [str(identity) for identity in range(data.num_identities)]
        self.problems, self.notes = [], []

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


def read_file(files: list[Path], max_pixels: int, index: int, spec: ImageSpec) -> Tensor:
    """Read an image file by its place; a ``partial`` of it is a :attr:`ImageSet.read` for data-loader workers too."""
    return read_image(files[index], spec, max_pixels)


@dataclass(frozen=True)
class ImageSet:
    """M images, with labels or pairs where they are known."""

    paths: list[str]
    """(M,) names of the images, in messages and in saved embeddings."""
    read: Read
    """Return an image ``(channels, size, size)`` fp32 in [-1, 1], from its number and a net's spec."""
    labels: Tensor | None = None
    """(M,) int64, the identity of each."""
    pairs: Pairs | None = None
    names: list[str] = field(default_factory=list)
    """Names of the identities, by label."""
    problems: list[str] = field(default_factory=list)
    """Faults found when the set was opened, with their places. Such images are not among the M."""
    notes: list[str] = field(default_factory=list)
    """Other facts that the user should know."""

    def __len__(self) -> int:
        return len(self.paths)


def set_of(source: ImageSource, name: str) -> ImageSet:
    """Return a source's images as a set. Images that are no files of their own are called ``name[0]`` and so on."""
    if isinstance(source, FileImages):
        paths = [str(path) for path in source.paths]
    else:
        paths = [f"{name}[{index}]" for index in range(len(source))]
    return ImageSet(paths, source.read, source.labels, names=source.names, problems=source.problems, notes=source.notes)


def ignore_interrupts(_: int) -> None:
    """Ignore Ctrl-C in a data-loader worker: the main process decides, and may still need the worker's images."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def common_spec(source: ImageSource, least: int = 32, most: int = 112) -> ImageSpec:
    """Return a spec for a source: color if one of up to 16 images has it, and their median side within bounds."""
    specs = []
    for index in torch.linspace(0, len(source) - 1, min(_PROBED, len(source))).long().tolist():
        try:
            specs.append(source.spec_of(index))
        except ValueError:  # reported when it is read
            continue
    sizes = sorted(spec.size for spec in specs) or [most]
    size = min(max(sizes[len(sizes) // 2], least), most)
    return ImageSpec(size, max((spec.channels for spec in specs), default=3))
