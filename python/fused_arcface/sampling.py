"""Which classes a step uses when it does not use all: every class of the batch, and others drawn by a keyed
permutation.

``rank(j)`` is a pseudorandom permutation of the *global* class ids, another one each step. Class j is used if it is
some row's target, or if ``rank(j) < cut``, with the cut such that ``round(sample_rate·C_total)`` classes are used over
all shards together (more only if the batch has more). Each shard asks this of its own ids alone: no sort, no exchange,
and the same classes whatever the number of shards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .keyed import SAMPLE, chunks, fold, fold_each
from .sharding import Sharding

_ROUNDS = 6  # three full Feistel rounds; with two, neighbouring ids are drawn together measurably more often


class Permutation:
    """A keyed permutation of ``0..size-1``: an unbalanced Feistel network over the cells of an ``a × b`` grid just
    larger.

    Its round functions are tables of the key's own random numbers, a or b entries (about √size). The fewer than a cells
    that lie past ``size`` are walked through: such a cell is mapped again until the result is an id.
    """

    def __init__(self, size: int, key: int, device: torch.device) -> None:
        self.size = size
        self.a = math.isqrt(size - 1) + 1
        self.b = -(-size // self.a)
        self._tables = []
        for step in range(_ROUNDS):
            inputs, outputs = (self.b, self.a) if step % 2 == 0 else (self.a, self.b)
            words = fold_each(fold(key, step), torch.arange(inputs, device=device))
            self._tables.append(((words >> 32) & 0x7FFFFFFF) % outputs)

    def _map(self, cells: Tensor) -> Tensor:
        left, right = cells // self.b, cells % self.b
        for step, table in enumerate(self._tables):
            if step % 2 == 0:
                left = left + table.index_select(0, right)
                left -= self.a * (left >= self.a)
            else:
                right = right + table.index_select(0, left)
                right -= self.b * (right >= self.b)
        return left * self.b + right

    def __call__(self, ids: Tensor) -> Tensor:
        """Ids (K,) int64 in [0, size) to their images."""
        result = self._map(ids)
        outside = (result >= self.size).nonzero().squeeze(1)
        while len(outside) > 0:
            result[outside] = self._map(result[outside])
            outside = outside[result[outside] >= self.size]
        return result


@dataclass(frozen=True)
class Sampler:
    """``sample_rate`` of ``sharding``'s classes each step; a function of seed and step."""

    sharding: Sharding
    sample_rate: float
    seed: int

    @property
    def count(self) -> int:
        """Classes used over all shards, unless the batch has more."""
        return max(1, round(self.sample_rate * self.sharding.num_classes))

    def __call__(self, step: int, target: Tensor) -> Tensor:
        """(K,) int64 ascending rows of this shard to use, for all ranks' labels (N,), where negative ones are of no
        class."""
        order = Permutation(self.sharding.num_classes, fold(self.seed, SAMPLE, step), target.device)
        cut = self._cut(order, target)
        used = torch.empty(self.sharding.num_local, dtype=torch.bool, device=target.device)
        for start, part in chunks(used):
            first = self.sharding.class_start + start
            torch.lt(order(torch.arange(first, first + len(part), device=target.device)), cut, out=part)
        local = self.sharding.localise(target)
        used[local[local >= 0]] = True
        return used.nonzero().squeeze(1)

    def _cut(self, order: Permutation, target: Tensor) -> Tensor:
        """0-dim: classes of a lower rank are used, so many that with the batch's own there are ``count``.

        With m others wanted, the m-th rank that no class of the batch has is ``m - 1`` plus those of the batch below
        it.
        """
        positives = target[target >= 0].unique()
        ranks = order(positives).sort().values
        others = self.count - len(positives)
        if others <= 0:
            return torch.zeros((), dtype=torch.int64, device=target.device)
        return others + (ranks - torch.arange(len(ranks), device=target.device) < others).sum()
