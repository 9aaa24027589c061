"""Handwritten digits: the 1797 images of 8×8 pixels that scikit-learn ships.

They are the UCI set "Optical Recognition of Handwritten Digits".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fused_arcface.base.extras import require

from .images import LabeledImages

TRAINED, UNSEEN = (0, 1, 2, 3, 4, 5, 6), (7, 8, 9)
"""The digits that a net is trained on, and those that it is verified on."""


def digit_images(digits: Sequence[int], size: int = 32) -> LabeledImages:
    """Return all images of some digits, ``(M, 1, size, size)``; the label is the digit's index in ``digits``.

    Args:
        digits: numbers from 0 to 9, each once.
        size: side in pixels; the images are enlarged from 8 by bilinear interpolation.

    Raises:
        MissingExtra: if scikit-learn is not installed.
        ValueError: if a digit is not in [0, 9] or is named twice.

    >>> digit_images([3, 8], size=16).images.shape
    torch.Size([357, 1, 16, 16])
    """
    if not digits or len(set(digits)) != len(digits) or not set(digits) <= set(range(10)):
        raise ValueError(f"digits must be different numbers from 0 to 9; got {list(digits)}")
    shipped = require("sklearn.datasets").load_digits()
    images = torch.as_tensor(shipped.images, dtype=torch.float32)[:, None] / 16  # written with 0 to 16
    label_of = torch.full((10,), -1)
    label_of[torch.tensor(list(digits))] = torch.arange(len(digits))
    labels = label_of[torch.as_tensor(shipped.target, dtype=torch.int64)]
    images = F.interpolate(images[labels >= 0], size=(size, size), mode="bilinear", align_corners=False)
    return LabeledImages(images, labels[labels >= 0])
