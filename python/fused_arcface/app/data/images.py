"""Images in memory, and the way from a file or its bytes to the tensor that a net takes."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fused_arcface.base.checks import check_size
from fused_arcface.base.extras import MissingExtra, require
from fused_arcface.base.reading import DataError, open_regular

from .alignment import align
from .image_formats import FORMATS, declared_sizes

MAX_PIXELS = 2**25
"""Pixels of the largest image that is decoded by default: 5792 × 5792, some 0.9 s and 560 MB of a WebP, the most."""


class LabeledImages(NamedTuple):
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
    """The input of a net: square images of one size and number of channels.

    Args:
        size: side in pixels, >= 1.
        channels: 1 (gray) or 3 (RGB).

    Raises:
        TypeError, ValueError: if an argument has a wrong type or is out of its range.

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
        """(channels, size, size)."""
        return self.channels, self.size, self.size


def read_image(
    source: Path | bytes,
    spec: ImageSpec,
    max_pixels: int = MAX_PIXELS,
    landmarks: npt.NDArray[np.float64] | None = None,
) -> Tensor:
    """Read an image of any size and mode as a net takes it: ``(channels, size, size)`` fp32 in [-1, 1].

    The picture is turned as its EXIF says, scaled so that its shorter side fits, and cut to the square in its middle.
    Transparent parts become white. Gray of 8, 16 or 32 bits keeps its depth. Floating-point pixels range from 0 to 1,
    or from 0 to 255 if one of them is above 1.

    The content of a file decides its format; its name does not. Only the formats of
    :data:`fused_arcface.app.data.image_formats.FORMATS` are tried. Decoding takes up to 17 bytes a pixel.

    Args:
        source: a file, or the bytes of one.
        spec: size and channels of the result.
        max_pixels: width times height that an image may have; checked before it is decoded.
        landmarks: (5, 2) eyes, nose and corners of the mouth, to align the face by in place of scaling and cutting; see
            :func:`fused_arcface.app.data.alignment.align`.

    Raises:
        ImageError: if it cannot be opened or decoded, has too many pixels, or has one that is not finite; or if the
            landmarks are not those of a face.
        MissingExtra: if Pillow is not installed.

    >>> import io; from PIL import Image
    >>> file = io.BytesIO(); Image.new("L", (50, 80), 255).save(file, "png")
    >>> read_image(file.getvalue(), ImageSpec(size=2, channels=1))
    tensor([[[1., 1.],
             [1., 1.]]])
    """
    with _opened(source, max_pixels) as image:
        require("PIL.ImageOps", "train").exif_transpose(image, in_place=True)
        return fit_image(image, spec, landmarks)


def fit_image(image: Any, spec: ImageSpec, landmarks: npt.NDArray[np.float64] | None = None) -> Tensor:
    """Return an upright image of Pillow, of any size and mode, as :func:`read_image` does.

    Raises:
        ValueError: if a pixel is not finite, or the landmarks are not those of a face.
    """
    pil, ops = require("PIL.Image", "train"), require("PIL.ImageOps", "train")
    plain = _as_plain(image, "L" if spec.channels == 1 else "RGB")
    if landmarks is None:
        plain = ops.fit(plain, (spec.size, spec.size), method=pil.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(plain, dtype=np.float32))
    else:
        pixels = torch.from_numpy(align(plain, landmarks, spec.size))
    pixels = pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
    return (pixels / 127.5 - 1).expand(spec.shape).contiguous()


def image_spec(source: Path | bytes, max_pixels: int = MAX_PIXELS) -> ImageSpec:
    """Return shorter side and number of channels of an image, as they are stored; its pixels are not decoded.

    Raises:
        ImageError: if it cannot be opened, or has too many pixels.
    """
    with _opened(source, max_pixels) as image:
        gray = image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I")
        return ImageSpec(min(image.size), 1 if gray else 3)


@contextlib.contextmanager
def naming(place: str) -> Iterator[None]:
    """Name the place of an image's bytes in the errors of a block."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{place}: {error}") from None


@contextlib.contextmanager
def _opened(source: Path | bytes, max_pixels: int) -> Iterator[Any]:
    """Open an image, not yet decoded. Whatever goes wrong with it, here or in the block, is an :class:`ImageError`.

    Decoders raise errors of many kinds for damaged files, so all are caught.
    """
    pil = require("PIL.Image", "train")
    if pil.MAX_IMAGE_PIXELS is not None:  # Pillow's own limit, below which it must not stop what is allowed here
        pil.MAX_IMAGE_PIXELS = max(pil.MAX_IMAGE_PIXELS, max_pixels)
    doing = "read"
    try:
        with warnings.catch_warnings(), _content(source) as file:
            # Pillow warns of sizes that are checked here, and of damage that is an error or does not matter.
            warnings.simplefilter("ignore", pil.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)
            for size in declared_sizes(file):
                _check_size(source, size, max_pixels)
            file.seek(0)
            with pil.open(file, formats=FORMATS) as image:
                _check_size(source, image.size, max_pixels)
                doing = "decoded"
                yield image
    except (ImageError, MissingExtra):
        raise
    except DataError as error:  # of the file
        raise ImageError(str(error)) from None
    except pil.UnidentifiedImageError:
        raise ImageError(f"{_name(source)} cannot be read as an image: none of {', '.join(FORMATS)}") from None
    except Exception as error:
        why = str(error) or type(error).__name__
        raise ImageError(f"{_name(source)} cannot be {doing} as an image: {why}") from None


def _content(source: Path | bytes) -> BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if not source.exists():  # said here, without a search for similar names: it may be one of many that are missing
        raise ImageError(f"{source} does not exist")
    return open_regular(source)


def _check_size(source: Path | bytes, size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageError(f"{_name(source)} must have at most max_pixels={max_pixels} pixels; got {width} × {height}")


def _name(source: Path | bytes) -> str:
    return f"an image of {len(source)} bytes" if isinstance(source, bytes) else str(source)


def _as_plain(image: Any, mode: str) -> Any:
    """Return ``image`` in 8-bit ``mode``, or in floating point from 0 to 255 if it is deep gray."""
    pil = require("PIL.Image", "train")
    if image.mode == "F" or image.mode.startswith("I"):
        pixels = np.array(image, dtype=np.float32)
        least, greatest = float(pixels.min()), float(pixels.max())  # NaN if one is
        if not math.isfinite(least) or not math.isfinite(greatest):
            raise ValueError("its pixels must be finite")
        # A 16-bit file comes as I;16, or as 32-bit integers of the same values from some versions of Pillow.
        depths = (1, 255) if image.mode == "F" else (65535, 2**31 - 1)
        deepest = depths[0] if greatest <= depths[0] else depths[1]
        pixels *= 255 / deepest
        return pil.fromarray(pixels.clip(0, 255, out=pixels))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        above = image if image.mode in ("RGBA", "LA") else image.convert("RGBA")
        image = pil.new("RGB", image.size, "white")
        image.paste(above, mask=above)
    return image if image.mode == mode else image.convert(mode)
