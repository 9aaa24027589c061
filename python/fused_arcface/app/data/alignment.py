"""Alignment of faces: eyes, nose and mouth go where insightface's nets were trained to find them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fused_arcface.base.extras import require

POINTS = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]])
"""Left eye, right eye, nose, left and right corner of the mouth, as x and y in an image of 112 pixels."""
_SIDE = 112


def align(image: Any, landmarks: npt.NDArray[np.float64], size: int) -> npt.NDArray[np.float32]:
    """Return the square of an image in which the face lies as in :data:`POINTS`; black where the image ends.

    The map is the similarity (turn, zoom, shift) with the least squared error at the five points, as in
    insightface's evaluation, and pixels are interpolated linearly.

    Args:
        image: image of Pillow, upright, of mode L, RGB or F.
        landmarks: (5, 2) the five points in pixels; the center of the first pixel is (0, 0), as OpenCV has it.
        size: side of the result in pixels.

    Returns:
        Pixels ``(size, size)``, or ``(size, size, 3)`` of a color image, on the scale of the image's.

    Raises:
        ValueError: if the landmarks do not have this shape, are not finite, or are all the same point.

    >>> import PIL.Image
    >>> align(PIL.Image.new("L", (112, 112), 255), POINTS, 2)
    array([[255., 255.],
           [255., 255.]], dtype=float32)
    """
    if landmarks.shape != (5, 2) or not np.isfinite(landmarks).all():
        raise ValueError(f"landmarks must be (5, 2) and finite; got {landmarks.tolist()}")
    # Pillow counts from the corner of the first pixel, and wants the map from the result to the image.
    factor, shift = _similarity(landmarks + 0.5, POINTS + 0.5)
    inverse, start = _SIDE / size / factor, -shift / factor
    pil = require("PIL.Image", "train")
    coefficients = (inverse.real, -inverse.imag, start.real, inverse.imag, inverse.real, start.imag)
    # In floating point: with 8 bits Pillow cuts off the fraction, and the face gets darker.
    bands = [
        band.convert("F").transform((size, size), pil.Transform.AFFINE, coefficients, pil.Resampling.BILINEAR)
        for band in image.split()
    ]
    found = [np.asarray(band, dtype=np.float32) for band in bands]
    return found[0] if len(found) == 1 else np.stack(found, axis=2)


def _similarity(points: npt.NDArray[np.float64], onto: npt.NDArray[np.float64]) -> tuple[complex, complex]:
    """Return a and b for which ``a·z + b`` is nearest to the targets, points as complex numbers x + iy."""
    z, w = points[:, 0] + 1j * points[:, 1], onto[:, 0] + 1j * onto[:, 1]
    centered = z - z.mean()
    spread = float((abs(centered) ** 2).sum())
    factor = complex((centered.conj() * w).sum()) / spread if spread else 0j
    if not factor:
        raise ValueError(f"landmarks must be five different points of a face; got {points.tolist()}")
    return factor, complex(w.mean() - factor * z.mean())
