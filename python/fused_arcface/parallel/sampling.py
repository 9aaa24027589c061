"""The classes of a sampled step: every class of the batch, and others drawn by a keyed permutation.

``order(j)`` is a pseudorandom permutation of the *global* class ids, a new one in each step. Class j is used if some
row has its label, or if ``order(j) < cut``. The cut is such that ``round(sample_rate·C_total)`` classes are used over
all shards together, more only if the batch has more. The inverse permutation gives the classes below the cut, so a
step costs time and memory of the sample, and √C_total, not of all classes. Each shard keeps its own ids of them. There
is no exchange, and the classes are the same for any number of shards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..base.keyed_random import SAMPLE, chunks, fold, fold_each
from .sharding import Sharding

ROUNDS = 6  # three full Feistel rounds; with two, neighboring ids are drawn together measurably more often

# Classes for each one of a sample up to which a byte for each class is marked: faster than to sort the sample.
_MARKED_CLASSES = 64


def grid_of(size: int) -> tuple[int, int]:
    """Return a and b of the ``a × b`` grid whose cells a permutation of ``0..size-1`` maps."""
    a = math.isqrt(size - 1) + 1
    return a, -(-size // a)


class KeyedPermutation(Protocol):
    """A pseudorandom permutation of ``0..size-1``. All implementations give the same numbers for a key."""

    def __init__(self, size: int, key: int, device: torch.device) -> None: ...

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the images of ids (K,) int64 in [0, size)."""
        ...

    def inverse(self, images: Tensor) -> Tensor:
        """Return the ids with these images (K,) int64 in [0, size)."""
        ...


class Permutation:
    """A keyed permutation of ``0..size-1``: an unbalanced Feistel network over the cells of an ``a × b`` grid.

    The grid has at least ``size`` cells, and fewer than a cells more. The round functions are tables of random numbers
    of the key, with a or b entries (about √size). A cell past ``size`` is mapped again until the result is an id. A
    table holds that result for each such cell, so no value is read and a GPU is not waited for.
    """

    def __init__(self, size: int, key: int, device: torch.device) -> None:
        self.size = size
        self.a, self.b = grid_of(size)
        self._tables = []
        for step in range(ROUNDS):
            inputs, outputs = (self.b, self.a) if step % 2 == 0 else (self.a, self.b)
            words = fold_each(fold(key, step), torch.arange(inputs, device=device))
            self._tables.append(((words >> 32) & 0x7FFFFFFF) % outputs)
        beyond = torch.arange(size, self.a * self.b, device=device)
        self._beyond = self._ends(self._map(beyond))
        self._beyond_inverse = self._ends(self._map_back(beyond))

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

    def _map_back(self, cells: Tensor) -> Tensor:
        left, right = cells // self.b, cells % self.b
        for step, table in reversed(list(enumerate(self._tables))):
            if step % 2 == 0:
                left = left - table.index_select(0, right)
                left += self.a * (left < 0)
            else:
                right = right - table.index_select(0, left)
                right += self.b * (right < 0)
        return left * self.b + right

    def _ends(self, images: Tensor) -> Tensor:
        """Return the ids at which the walks of the cells past ``size`` end, from the images of these cells."""
        # Each turn doubles the steps of an entry's walk, and no walk is longer than the number of such cells.
        for _ in range(len(images).bit_length()):
            images = self._walk(images, images)
        return images

    def _walk(self, cells: Tensor, beyond: Tensor) -> Tensor:
        """Return the cells, with those past ``size`` replaced by their entries of the table ``beyond``."""
        if len(beyond) == 0:
            return cells
        further = beyond.index_select(0, (cells - self.size).clamp_(min=0))
        return torch.where(cells < self.size, cells, further)

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the images of ids (K,) int64 in [0, size)."""
        return self._walk(self._map(ids), self._beyond)

    def inverse(self, images: Tensor) -> Tensor:
        """Return the ids with these images (K,) int64 in [0, size)."""
        return self._walk(self._map_back(images), self._beyond_inverse)


@dataclass(frozen=True)
class Draw:
    """The part of a step's sample that is known before its labels."""

    order: KeyedPermutation
    drawn: Tensor
    """(count,) int64 global classes in the order of the draw. The step uses the first of them, as many as the cut."""


@dataclass(frozen=True)
class Sampler:
    """Draws the classes of each step, as a function of seed and step."""

    sharding: Sharding
    sample_rate: float
    seed: int
    permutation: type[KeyedPermutation] = Permutation

    @property
    def count(self) -> int:
        """Number of classes used over all shards, unless the batch has more."""
        return max(1, round(self.sample_rate * self.sharding.num_classes))

    def draw(self, step: int, device: torch.device) -> Draw:
        """Return the draw of a training step."""
        order = self.permutation(self.sharding.num_classes, fold(self.seed, SAMPLE, step), device)
        drawn = torch.arange(self.count, device=device)
        for _, part in chunks(drawn):
            part.copy_(order.inverse(part))
        return Draw(order, drawn)

    def candidates(self, draw: Draw, padded: bool = False) -> Tensor:
        """Return this shard's drawn classes (K,), int64 local indices, ascending.

        The step uses no others but those of the labels. ``padded`` is that of :meth:`padded`, of a size that is known.
        """
        local = self._local(draw.drawn)
        return local.sort().values[: self._most(0)] if padded else self._ascending(local)

    def __call__(self, step: int, labels: Tensor, draw: Draw | None = None) -> Tensor:
        """Return the classes of this shard to use, (K,) int64 local indices, ascending.

        Args:
            step: number of the training step.
            labels: (N,) global labels of all ranks; negative ones are ignored.
            draw: :meth:`draw` of this step, if it is at hand.
        """
        return self._ascending(self._used(step, labels, draw))

    def padded(self, step: int, labels: Tensor, draw: Draw | None = None) -> Tensor:
        """Return the same classes, padded at the end with ``num_local``, without waiting for a GPU to count them.

        The size K depends on the number of labels alone.
        """
        return self._used(step, labels, draw).sort().values[: self._most(labels.shape[0])]

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

    def _used(self, step: int, labels: Tensor, draw: Draw | None) -> Tensor:
        """Return the classes of this shard that are used, each once, and ``num_local`` for all others, (count + N,)."""
        draw = draw or self.draw(step, labels.device)
        labels = labels.sort().values
        first = (labels >= 0) & (labels != labels.roll(1))
        first[:1] = labels[:1] >= 0
        others = self.count - first.sum()
        # Repeated and ignored labels come after all classes.
        images = torch.where(first, draw.order(labels.clamp(min=0)), 2 * self.sharding.num_classes)
        cut = self._cut(images.sort().values, others)
        drawn = torch.where(torch.arange(self.count, device=labels.device) < cut, draw.drawn, -1)
        # Classes of the batch that are not drawn anyway.
        return self._local(torch.cat([drawn, torch.where(first & (images >= cut), labels, -1)]))

    def _cut(self, images: Tensor, others: Tensor) -> Tensor:
        """Return the cut, 0-dim: the classes below it and the batch's own are ``count`` together.

        If m others are wanted, the cut is m plus the number of the batch's classes below it.

        Args:
            images: (N,) of the batch's classes, ascending.
            others: 0-dim, m.
        """
        below = images - torch.arange(len(images), device=images.device) < others
        below &= images < self.sharding.num_classes
        return torch.where(others > 0, others + below.sum(), 0)

    def _local(self, ids: Tensor) -> Tensor:
        """Return global ids (K,) as local indices, ``num_local`` for negative ids and other shards'."""
        local = self.sharding.localize(ids)
        return torch.where(local < 0, self.sharding.num_local, local)

    def _ascending(self, local: Tensor) -> Tensor:
        """Return local indices (K,) in ascending order, without ``num_local``."""
        num_local = self.sharding.num_local
        if num_local > _MARKED_CLASSES * len(local):
            ids = local.sort().values
            return ids[: int((ids < num_local).sum())]
        marked = torch.zeros(num_local + 1, dtype=torch.bool, device=local.device).index_fill_(0, local, True)
        return marked[:-1].nonzero().squeeze(1)
