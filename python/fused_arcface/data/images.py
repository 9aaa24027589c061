"""What every source of images in memory gives, and what training and verification take."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LabelledImages(NamedTuple):
    """Images and whom they show."""

    images: Tensor
    """(M, channels, height, width) fp32, about 0 to 1."""
    labels: Tensor
    """(M,) int64, from 0 to the number of identities - 1."""

    @property
    def num_identities(self) -> int:
        return int(self.labels.max()) + 1
