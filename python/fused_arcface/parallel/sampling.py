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

from ..base.keyed_random import SAMPLE, chunks, fold, fold_each
from .sharding import Sharding

_ROUNDS = 6  # three full Feistel rounds; with two, neighboring ids are drawn together measurably more often


class Permutation:
    """A keyed permutation of ``0..size-1``: an unbalanced Feistel network over the cells of an ``a × b`` grid just
    larger.

    Its round functions are tables of the key's own random numbers, a or b entries (about √size). The fewer than a cells
    that lie past ``size`` are walked through: such a cell is mapped again until the result is an id. Where each of them
    leads is tabled as well, so that nothing here depends on a value and a GPU need not be waited for.
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
        cells = self.a * self.b
        self._beyond = self._map(torch.arange(size, cells, device=device))
        # Each turn doubles the steps that an entry has walked, and no walk has more steps than there are such cells.
        for _ in range((cells - size).bit_length()):
            self._beyond = self._walk(self._beyond)

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

    def _walk(self, cells: Tensor) -> Tensor:
        """Cells with those past ``size`` replaced by where the table has them."""
        if len(self._beyond) == 0:
            return cells
        further = self._beyond.index_select(0, (cells - self.size).clamp_(min=0))
        return torch.where(cells < self.size, cells, further)

    def __call__(self, ids: Tensor) -> Tensor:
        """Ids (K,) int64 in [0, size) to their images."""
        return self._walk(self._map(ids))


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
        return self._used(step, target).nonzero().squeeze(1)

    def padded(self, step: int, target: Tensor) -> Tensor:
        """The same rows without waiting for a GPU to count them, followed by ``num_local``, the row of no class.

        (K,) of a size that depends on that of ``target`` alone.
        """
        places = self._used(step, target).cumsum(0)
        # The k-th row that is used is the first by which k have been.
        wanted = torch.arange(1, self._most(target.shape[0]) + 1, device=target.device)
        return torch.searchsorted(places, wanted)

    def _most(self, num_rows: int) -> int:
        """How many rows this shard may have to use for a batch of ``num_rows``: never more over all shards, and with a
        probability below 1e-22 more in one of several (the row's loss is NaN then).

        Of n others drawn, a shard has a hypergeometric number with a mean of μ, which exceeds μ + t with a probability
        of at most exp(-t²/(2μ + 2t/3)) (Bernstein; Hoeffding, 1963, section 6): t = 10·√μ + 34 makes that e^-50.
        """
        total, num_local = max(self.count, num_rows), self.sharding.num_local
        mean = self.count * num_local / self.sharding.num_classes
        return min(num_local, total, num_rows + math.ceil(mean + 10 * math.sqrt(mean) + 34))

    def _used(self, step: int, target: Tensor) -> Tensor:
        """(num_local,) bool."""
        order = Permutation(self.sharding.num_classes, fold(self.seed, SAMPLE, step), target.device)
        cut = self._cut(order, target)
        # One more, for the labels that are of other shards or of no class.
        used = torch.empty(self.sharding.num_local + 1, dtype=torch.bool, device=target.device)
        for start, part in chunks(used[:-1]):
            first = self.sharding.class_start + start
            torch.lt(order(torch.arange(first, first + len(part), device=target.device)), cut, out=part)
        local = self.sharding.localize(target)
        used.index_fill_(0, torch.where(local < 0, self.sharding.num_local, local), True)
        return used[:-1]

    def _cut(self, order: Permutation, target: Tensor) -> Tensor:
        """0-dim: classes of a lower rank are used, so many that with the batch's own there are ``count``.

        With m others wanted, the m-th rank that no class of the batch has is ``m - 1`` plus those of the batch below
        it.
        """
        labels = target.sort().values
        first = (labels >= 0) & (labels != labels.roll(1))
        first[:1] = labels[:1] >= 0
        others = self.count - first.sum()
        # Labels that repeat or are of no class get a rank past all.
        ranks = torch.where(first, order(labels.clamp(min=0)), 2 * self.sharding.num_classes).sort().values
        below = (ranks - torch.arange(len(ranks), device=target.device) < others) & (ranks < self.sharding.num_classes)
        return torch.where(others > 0, others + below.sum(), 0)
