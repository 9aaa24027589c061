"""The classes of a sampled step: every class of the batch, and others drawn by a keyed permutation.

``order(j)`` is a pseudorandom permutation of the *global* class ids, a new one in each step. Class j is used if some
row has its label, or if ``order(j) < cut``. The cut is such that ``round(sample_rate·C_total)`` classes are used over
all shards together, more only if the batch has more. Each shard evaluates this for its own ids. It needs neither a sort
nor an exchange, and gives the same classes for any number of shards.
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
    """A keyed permutation of ``0..size-1``: an unbalanced Feistel network over the cells of an ``a × b`` grid.

    The grid has at least ``size`` cells, and fewer than a cells more. The round functions are tables of random numbers
    of the key, with a or b entries (about √size). A cell past ``size`` is mapped again until the result is an id. A
    table holds that result for each such cell, so no value is read and a GPU is not waited for.
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
        # Each turn doubles the steps of an entry's walk, and no walk is longer than the number of such cells.
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
        """Return the cells, with those past ``size`` replaced by the ids in the table."""
        if len(self._beyond) == 0:
            return cells
        further = self._beyond.index_select(0, (cells - self.size).clamp_(min=0))
        return torch.where(cells < self.size, cells, further)

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the images of ids (K,) int64 in [0, size)."""
        return self._walk(self._map(ids))


@dataclass(frozen=True)
class Sampler:
    """Draws the classes of each step, as a function of seed and step."""

    sharding: Sharding
    sample_rate: float
    seed: int

    @property
    def count(self) -> int:
        """Number of classes used over all shards, unless the batch has more."""
        return max(1, round(self.sample_rate * self.sharding.num_classes))

    def __call__(self, step: int, labels: Tensor) -> Tensor:
        """Return the classes of this shard to use, (K,) int64 local indices, ascending.

        Args:
            step: number of the training step.
            labels: (N,) global labels of all ranks; negative ones are ignored.
        """
        return self._used(step, labels).nonzero().squeeze(1)

    def padded(self, step: int, labels: Tensor) -> Tensor:
        """Return the same classes, padded at the end with ``num_local``, without waiting for a GPU to count them.

        The size K depends on the number of labels alone.
        """
        used_so_far = self._used(step, labels).cumsum(0)
        # The k-th used class is the first one at which the count is k.
        wanted = torch.arange(1, self._most(labels.shape[0]) + 1, device=labels.device)
        return torch.searchsorted(used_so_far, wanted)

    def _most(self, num_rows: int) -> int:
        """Return the largest number of classes that this shard uses for a batch of ``num_rows``.

        It is exact for a single shard. One of several shards exceeds it with a probability below 1e-22; the loss of the
        rows concerned is then NaN.

        The number of drawn classes in a shard is hypergeometric, with mean μ. It exceeds μ + t with a probability of at
        most exp(-t²/(2μ + 2t/3)) (Bernstein; Hoeffding, 1963, section 6). With t = 10·√μ + 34 that is e^-50.
        """
        total, num_local = max(self.count, num_rows), self.sharding.num_local
        mean = self.count * num_local / self.sharding.num_classes
        return min(num_local, total, num_rows + math.ceil(mean + 10 * math.sqrt(mean) + 34))

    def _used(self, step: int, labels: Tensor) -> Tensor:
        """Return whether each class of this shard is used, (num_local,) bool."""
        order = Permutation(self.sharding.num_classes, fold(self.seed, SAMPLE, step), labels.device)
        cut = self._cut(order, labels)
        # The last element takes the labels of other shards and the ignored ones.
        used = torch.empty(self.sharding.num_local + 1, dtype=torch.bool, device=labels.device)
        for start, part in chunks(used[:-1]):
            first = self.sharding.class_start + start
            torch.lt(order(torch.arange(first, first + len(part), device=labels.device)), cut, out=part)
        local = self.sharding.localize(labels)
        used.index_fill_(0, torch.where(local < 0, self.sharding.num_local, local), True)
        return used[:-1]

    def _cut(self, order: Permutation, labels: Tensor) -> Tensor:
        """Return the cut, 0-dim: the classes below it and the batch's own are ``count`` together.

        If m others are wanted, the cut is m plus the number of the batch's classes below it.
        """
        labels = labels.sort().values
        first = (labels >= 0) & (labels != labels.roll(1))
        first[:1] = labels[:1] >= 0
        others = self.count - first.sum()
        # Repeated and ignored labels come after all classes.
        images = torch.where(first, order(labels.clamp(min=0)), 2 * self.sharding.num_classes).sort().values
        below = images - torch.arange(len(images), device=labels.device) < others
        below &= images < self.sharding.num_classes
        return torch.where(others > 0, others + below.sum(), 0)
