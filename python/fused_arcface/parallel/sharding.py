"""The shards: each rank holds a contiguous range of class ids, and the first ``C_total % W`` ranks hold one more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sharding:
    """The shard of one rank, when ``num_classes`` (C_total) class centers are split over ``world_size`` (W) ranks.

    >>> [Sharding(10, 4, rank).num_local for rank in range(4)]
    [3, 3, 2, 2]
    """

    num_classes: int
    world_size: int = 1
    rank: int = 0

    @property
    def class_start(self) -> int:
        """Global id of this shard's first class."""
        return self.num_classes // self.world_size * self.rank + min(self.rank, self.num_classes % self.world_size)

    @property
    def num_local(self) -> int:
        """Number of classes in this shard."""
        return self.num_classes // self.world_size + (self.rank < self.num_classes % self.world_size)

    def counts(self) -> list[int]:
        """Return the number of classes in each rank's shard."""
        return [Sharding(self.num_classes, self.world_size, rank).num_local for rank in range(self.world_size)]

    def localize(self, labels: Tensor) -> Tensor:
        """Return global labels (N,) as indices of this shard's classes, -1 for another shard's.

        Negative labels stay as they are.
        """
        if self.num_local == self.num_classes:
            return labels
        local = labels - self.class_start
        here = (local >= 0) & (local < self.num_local)
        return torch.where(here, local, labels.clamp(max=-1))
