"""Batches: shuffled ones, several images of each identity, and two views of each image."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import LabeledImages


def shuffled_batches(data: LabeledImages, batch_size: int, steps: int, seed: int) -> Iterator[LabeledImages]:
    """Yield batches of exactly ``batch_size`` images, the same for the same seed.

    Images are drawn without replacement until too few are left for a batch, then all of them are shuffled anew.

    Raises:
        ValueError: if there are fewer images than a batch holds.

    >>> data = LabeledImages(torch.zeros(9, 1, 2, 2), torch.arange(9))
    >>> [len(batch.labels) for batch in shuffled_batches(data, batch_size=4, steps=3, seed=0)]
    [4, 4, 4]
    """
    total = len(data.labels)
    if total < batch_size:
        raise ValueError(f"batch_size must be <= the number of images {total}; got {batch_size}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(total, generator=generator)
        rows, order = order[:batch_size], order[batch_size:]
        yield LabeledImages(data.images[rows], data.labels[rows])


def identity_batches(
    data: LabeledImages, batch_size: int, steps: int, seed: int, least_each: int = 4
) -> Iterator[LabeledImages]:
    """Yield batches with as many images of one identity as of another, at least ``least_each``.

    A batch holds as many identities as that allows. An identity with too few images has some of them twice.

    Raises:
        ValueError: if a batch does not hold two identities.

    >>> data = LabeledImages(torch.zeros(9, 1, 2, 2), torch.arange(9) // 3)
    >>> next(identity_batches(data, 4, steps=1, seed=0, least_each=2)).labels.bincount().sort().values
    tensor([0, 2, 2])
    """
    count = min(batch_size // least_each, data.num_identities)
    if count < 2:
        rule = f"batch_size must hold least_each={least_each} images of two identities, of {data.num_identities}"
        raise ValueError(f"{rule}; got {batch_size}")
    images_each = batch_size // count
    rows_of = [(data.labels == identity).nonzero()[:, 0] for identity in range(data.num_identities)]
    generator = torch.Generator().manual_seed(seed)

    def some(rows: Tensor) -> Tensor:
        times = math.ceil(images_each / len(rows))
        shuffled = [rows[torch.randperm(len(rows), generator=generator)] for _ in range(times)]
        return torch.cat(shuffled)[:images_each]

    for _ in range(steps):
        identities = torch.randperm(len(rows_of), generator=generator)[:count]
        rows = torch.cat([some(rows_of[identity]) for identity in identities.tolist()])
        yield LabeledImages(data.images[rows], data.labels[rows])


def two_view_batches(data: LabeledImages, batch_size: int, steps: int, seed: int) -> Iterator[LabeledImages]:
    """Yield two random views of each of ``batch_size / 2`` images.

    A label is the image's number in the batch; the identities are not used.
    """
    generator = torch.Generator().manual_seed(seed)
    for images, _ in shuffled_batches(data, batch_size // 2, steps, seed):
        views = [random_view(images, generator) for _ in range(2)]
        yield LabeledImages(torch.cat(views), torch.arange(len(images)).repeat(2))


def random_view(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, stretch, move and add noise to images ``(N, channels, height, width)``, each in its own way.

    Standard deviations: 0.15 radians, 0.1 for each entry of the linear map, 0.08 of half the side, 0.1 of a pixel.
    """
    normal = torch.randn(len(images), 7, generator=generator)
    angle = 0.15 * normal[:, 0]
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    linear = turn + 0.1 * normal[:, 1:5].view(-1, 2, 2)
    affine = torch.cat([linear, 0.08 * normal[:, 5:, None]], 2)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return moved + 0.1 * torch.randn(images.shape, generator=generator)
