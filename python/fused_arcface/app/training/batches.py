"""The images of each step, and their reading.

Batches are a function of the seed alone: neither the number of ranks nor an interruption changes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fused_arcface.base.keyed_random import BATCH, fold
from fused_arcface.base.reading import DataError

from ..data.images import ImageError, ImageSpec
from ..data.sources import ImageSource, ignore_interrupts
from .augment import augment

_MOST_UNREADABLE = 100  # unreadable images in a row; more mean that the source is wrong, not an image

_GIVEN_UP = -1  # label for an image that could not be read, when none after it could be read either


class Batch(NamedTuple):
    """One rank's share of a step."""

    images: Tensor
    """(n, channels, size, size) fp32."""
    labels: Tensor
    """(n,) int64."""
    problems: list[str]
    """Messages about images that could not be read; the next readable image is in the batch instead."""


class Item(NamedTuple):
    """An image to read."""

    place: int
    mirrored: bool
    key: int
    """Key of the random numbers of :func:`~fused_arcface.app.training.augment.augment`."""


@dataclass(frozen=True)
class BatchPlan:
    """The joint batches of all ranks.

    Each epoch has a new order of all images, cut into whole batches. An epoch does not use the images left at its end.
    """

    num_images: int
    batch_size: int
    """Images of a joint batch; if there are fewer, a batch has all images."""
    seed: int
    flip: bool
    labels: Tensor | None = None
    """(num_images,) int64, from 0 to C - 1, each at least once: draw all classes equally often. None: all images."""

    @property
    def rows(self) -> int:
        """Number of images that a batch really has."""
        return min(self.batch_size, self.num_images)

    @property
    def steps_per_epoch(self) -> int:
        return self.num_images // self.rows

    def epoch(self, epoch: int) -> list[list[Item]]:
        """Return the batches of one epoch; the first epoch is 0."""
        generator = torch.Generator().manual_seed(fold(self.seed, BATCH, epoch) >> 1)
        shuffled = torch.randperm(self.num_images, generator=generator)
        order = self._balanced(shuffled, generator) if self.labels is not None else shuffled
        order = order[: self.steps_per_epoch * self.rows]
        mirrored = (torch.rand(len(order), generator=generator) < 0.5) & self.flip
        keys = torch.randint(2**63 - 1, (len(order),), generator=generator)
        items = list(map(Item, order.tolist(), mirrored.tolist(), keys.tolist()))
        return [items[start : start + self.rows] for start in range(0, len(items), self.rows)]

    def _balanced(self, shuffled: Tensor, generator: torch.Generator) -> Tensor:
        """Return the images of an epoch, (num_images,): C images of C different classes, again and again."""
        assert self.labels is not None
        by_class = shuffled[self.labels[shuffled].argsort(stable=True)]  # within a class in random order
        counts = self.labels.bincount()
        first = counts.cumsum(0) - counts
        rounds = range(-(-self.num_images // len(counts)))
        # In each round every class gives its next image, the first one again after the last.
        turns = [(first + place % counts)[torch.randperm(len(counts), generator=generator)] for place in rounds]
        return by_class[torch.cat(turns)[: self.num_images]]

    def from_step(self, step: int, steps: int, share: slice) -> Iterator[list[Item]]:
        """Yield a share of the batches from ``step`` to the last one before ``steps``.

        Both are counted from 0 over all epochs.
        """
        while step < steps:
            epoch, within = divmod(step, self.steps_per_epoch)
            for batch in self.epoch(epoch)[within : within + steps - step]:
                yield batch[share]
                step += 1


def share_bounds(rows: int, parts: int) -> list[int]:
    """Return the ``parts + 1`` rows at which a joint batch is cut into ``parts`` micro-batches.

    >>> share_bounds(10, 4)
    [0, 2, 5, 7, 10]
    """
    return [rows * part // parts for part in range(parts + 1)]


class _ReadImages(Dataset[Batch]):
    """Reads single items, in the loader's workers."""

    def __init__(self, source: ImageSource, spec: ImageSpec, level: str) -> None:
        self._source, self._spec, self._level = source, spec, level

    def __getitem__(self, item: Item) -> Batch:
        problems: list[str] = []
        for distance in range(min(_MOST_UNREADABLE, len(self._source))):
            index = (item.place + distance) % len(self._source)
            try:
                image = self._source.read(index, self._spec)
                if not image.isfinite().all():  # it would make a whole step useless
                    raise ImageError(f"image {index} of the data has pixels that are not finite")
            except (ValueError, OSError) as error:
                problems.append(str(error))
                continue
            image = augment(image.flip(-1) if item.mirrored else image, self._level, item.key)
            return Batch(image, self._source.labels[index], problems)
        problems.append(f"{len(problems)} images in a row cannot be read; the last: {problems[-1]}")
        return Batch(torch.zeros(self._spec.shape), torch.tensor(_GIVEN_UP), problems)


def _collate(samples: list[Batch]) -> Batch:
    images, labels, problems = zip(*samples, strict=True)
    return Batch(torch.stack(images), torch.stack(labels), [each for some in problems for each in some])


def load_batches(
    source: ImageSource, spec: ImageSpec, items: Iterator[list[Item]], workers: int, pin_memory: bool, level: str
) -> Iterator[Batch]:
    """Yield batches, read ahead in ``workers`` processes if there are any.

    Images are changed at random as :func:`~fused_arcface.app.training.augment.augment` does at ``level``.

    Raises:
        DataError: if no image can be read.
    """
    loader = DataLoader(
        _ReadImages(source, spec, level),
        batch_sampler=items,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=ignore_interrupts,
    )
    for batch in loader:
        # Raised here, not in a worker: an error from a worker comes with that process's traceback.
        if (batch.labels == _GIVEN_UP).any():
            raise DataError(batch.problems[-1])
        yield batch
