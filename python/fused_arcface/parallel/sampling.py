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

import torch
from torch import Tensor

from ..base.keyed_random import SAMPLE, chunks, fold
from ..base.permutation import KeyedPermutation, Permutation
from .sharding import Sharding

# Classes for each one of a sample up to which a byte for each class is marked: faster than to sort the sample.
_MARKED_CLASSES = 64


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

    def __call__(self, step: int, labels: Tensor, padded: bool = False) -> Tensor:
        """Return the classes of this shard to use, (K,) int64 local indices, ascending.

        Args:
            step: number of the training step.
            labels: (N,) global labels of all ranks; negative ones are ignored.
            padded: If true, pad the classes at the end with ``num_local``. K then depends on N alone, so nobody waits
                for a GPU to count the classes.
        """
        return self._ascending(self._used(step, labels), self._most(len(labels)) if padded else None)

    def candidates(self, step: int, device: torch.device, padded: bool = False) -> Tensor:
        """Return the classes that a step draws before it knows its labels. It adds only the classes of the labels."""
        _, drawn = self._draw(step, device)
        return self._ascending(self._local(drawn), self._most(0) if padded else None)

    def _draw(self, step: int, device: torch.device) -> tuple[KeyedPermutation, Tensor]:
        """Return the permutation of a step and the (count,) int64 global classes that it draws, in order.

        The step uses the first of them, as many as the cut.
        """
        order = self.permutation(self.sharding.num_classes, fold(self.seed, SAMPLE, step), device)
        drawn = torch.arange(self.count, device=device)
        for _, part in chunks(drawn):
            part.copy_(order.inverse(part))
        return order, drawn

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
        """Return the classes of this shard that are used, each once, and ``num_local`` for all others, (count + N,)."""
        order, drawn = self._draw(step, labels.device)
        labels = labels.sort().values
        first = (labels >= 0) & (labels != labels.roll(1))
        first[:1] = labels[:1] >= 0
        others = self.count - first.sum()
        # Repeated and ignored labels come after all classes.
        images = torch.where(first, order(labels.clamp(min=0)), 2 * self.sharding.num_classes)
        cut = self._cut(images.sort().values, others)
        drawn = torch.where(torch.arange(self.count, device=labels.device) < cut, drawn, -1)
        # Classes of the batch that are not drawn anyway.
        return self._local(torch.cat([drawn, torch.where(first & (images >= cut), labels, -1)]))

    def _cut(self, images: Tensor, others: Tensor) -> Tensor:
        """Return the cut, 0-dim: the classes below it and the batch's own are ``count`` together.

        If m ``others`` (0-dim) are wanted, the cut is m plus the number of the batch's classes below it. The ``images``
        (N,) of these ascend.
        """
        below = images - torch.arange(len(images), device=images.device) < others
        below &= images < self.sharding.num_classes
        return torch.where(others > 0, others + below.sum(), 0)

    def _local(self, ids: Tensor) -> Tensor:
        """Return global ids (K,) as local indices, ``num_local`` for negative ids and other shards'."""
        local = self.sharding.localize(ids)
        return torch.where(local < 0, self.sharding.num_local, local)

    def _ascending(self, local: Tensor, size: int | None) -> Tensor:
        """Return local indices (K,), ascending, without ``num_local``.

        With a ``size`` return that many, and keep ``num_local``.
        """
        num_local = self.sharding.num_local
        if size is not None:
            return local.sort().values[:size]
        if num_local > _MARKED_CLASSES * len(local):
            ids = local.sort().values
            return ids[: int((ids < num_local).sum())]
        marked = torch.zeros(num_local + 1, dtype=torch.bool, device=local.device).index_fill_(0, local, True)
        return marked[:-1].nonzero().squeeze(1)
