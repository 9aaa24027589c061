"""Images: what sources in memory give, and how a file or its bytes become what a net takes."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checks import check_size
from ..extras import require
from ..reading import DataError


class LabelledImages(NamedTuple):
    """Images and whom they show."""

    images: Tensor
    """(M, channels, height, width) fp32, about 0 to 1."""
    labels: Tensor
    """(M,) int64, from 0 to the number of identities - 1."""

    @property
    def num_identities(self) -> int:
        return int(self.labels.max()) + 1


class ImageError(DataError):
    """A file or its bytes cannot be read as an image; the message says which and why."""


@dataclass(frozen=True)
class ImageSpec:
    """What a net takes: square images of one size and number of channels.

    Args:
        size: side in pixels, >= 1.
        channels: 1 (grey) or 3 (RGB).

    Raises:
        TypeError, ValueError: an argument of a wrong type or out of its range.

    >>> ImageSpec(size=112, channels=3).shape
    (3, 112, 112)
    """

    size: int
    channels: int

    def __post_init__(self) -> None:
        check_size("size", self.size)
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3; got {self.channels}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, size, size)"""
        return self.channels, self.size, self.size


def read_image(source: Path | bytes, spec: ImageSpec) -> Tensor:
    """An image of any size and mode as a net takes it: ``(channels, size, size)`` fp32 in [-1, 1].

    The picture is turned as its EXIF says, scaled so that its shorter side fits, and cut to the square in its middle.
    Transparent parts lie on white. Grey of 8, 16 or 32 bits keeps its depth; floating-point pixels count from 0 to 1,
    or to 255 where one of them is above 1.

    Args:
        source: a file, or the bytes of one, in any format that Pillow reads.
        spec: of the result.

    Raises:
        ImageError: it cannot be opened or decoded.
        MissingExtra: Pillow is not installed.

    >>> import io; from PIL import Image
    >>> file = io.BytesIO(); Image.new("L", (50, 80), 255).save(file, "png")
    >>> read_image(file.getvalue(), ImageSpec(size=2, channels=1))
    tensor([[[1., 1.],
             [1., 1.]]])
    """
    image, ops = _open(source), require("PIL.ImageOps", "train")
    try:
        image = _as_plain(ops.exif_transpose(image), "L" if spec.channels == 1 else "RGB")
        resampling = require("PIL.Image", "train").Resampling.BILINEAR
        image = ops.fit(image, (spec.size, spec.size), method=resampling)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise ImageError(f"{_name(source)} cannot be decoded as an image: {error}") from None
    pixels = pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
    return (pixels / 127.5 - 1).expand(spec.shape).contiguous()


def image_spec(source: Path | bytes) -> ImageSpec:
    """Shorter side and number of channels of an image, as they are stored; its pixels are not decoded.

    Raises:
        ImageError: it cannot be opened.
    """
    image = _open(source)
    return ImageSpec(min(image.size), 1 if image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I") else 3)


def _open(source: Path | bytes) -> Any:
    image = require("PIL.Image", "train")
    try:
        return image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
        why = "no format that Pillow knows" if isinstance(error, image.UnidentifiedImageError) else str(error)
        raise ImageError(f"{_name(source)} cannot be read as an image: {why}") from None


def _name(source: Path | bytes) -> str:
    return f"an image of {len(source)} bytes" if isinstance(source, bytes) else str(source)


def _as_plain(image: Any, mode: str) -> Any:
    """``image`` in 8-bit ``mode``, or in floating point from 0 to 255 if it is deep grey."""
    if image.mode == "F" or image.mode.startswith("I"):
        pixels = np.array(image, dtype=np.float32)
        # A 16-bit file comes as I;16, or as 32-bit integers of the same values from some versions of Pillow.
        deepest = 255 if pixels.max() > 1 else 1
        if image.mode != "F":
            deepest = 65535 if pixels.max() <= 65535 else 2**31 - 1
        return require("PIL.Image", "train").fromarray((pixels * (255 / deepest)).clip(0, 255))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = require("PIL.Image", "train").new("RGBA", image.size, "white")
        image = require("PIL.Image", "train").alpha_composite(paper, image)
    return image.convert(mode)
