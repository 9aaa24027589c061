"""Which rank holds which classes: contiguous ranges of global class ids, the first ``C_total % W`` ranks hold one class
more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sharding:
    """``num_classes`` (C_total) class centers over ``world_size`` (W) ranks, seen from ``rank``.

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
        """Classes in this shard."""
        return self.num_classes // self.world_size + (self.rank < self.num_classes % self.world_size)

    def counts(self) -> list[int]:
        """Classes in each rank's shard."""
        return [Sharding(self.num_classes, self.world_size, rank).num_local for rank in range(self.world_size)]

    def localize(self, target: Tensor) -> Tensor:
        """Global labels (N,) as rows of this shard, -1 where the class is in another; negative labels stay."""
        local = target - self.class_start
        here = (local >= 0) & (local < self.num_local)
        return torch.where(here, local, target.clamp(max=-1))
