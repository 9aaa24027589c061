"""Pairs of images by their numbers, and how they are made from labels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Pairs(NamedTuple):
    """Pairs of images by their numbers.

    >>> Pairs(torch.tensor([0]), torch.tensor([1]), torch.tensor([True])).same
    tensor([True])
    """

    first: Tensor
    """Numbers of the first images, (P,) int64."""
    second: Tensor
    """Numbers of the second images, (P,) int64."""
    same: Tensor
    """(P,) bool: both show the same identity."""


def balanced_pairs(labels: Tensor, most: int = 20_000, seed: int = 0) -> Pairs:
    """Choose as many pairs of one identity as of two, in random order, none twice.

    Time and memory grow with the images and the chosen pairs, not with the number of all pairs.

    Args:
        labels: identities (M,).
        most: greatest number of pairs of each kind.
        seed: seed of the choice.

    Raises:
        ValueError: if no identity has two images, or there is only one identity.

    >>> balanced_pairs(torch.tensor([0, 0, 1])).same.sort().values
    tensor([False,  True])
    """
    # The images are sorted by label, and image i is paired with all after it: first the images of the same identity,
    # which end at group_end[i], then those of others. This numbers the pairs of both kinds, so that choosing numbers
    # chooses pairs.
    order = np.argsort(labels.cpu().numpy(), kind="stable")
    ordered = labels.cpu().numpy()[order]
    position = np.arange(len(ordered))
    group_end = np.searchsorted(ordered, ordered, side="right")
    partners = {True: (position + 1, group_end), False: (group_end, np.full_like(position, len(ordered)))}
    totals = {same: int((end - start).sum()) for same, (start, end) in partners.items()}
    count = min(most, *totals.values())
    if count <= 0:
        raise ValueError("labels must hold two identities or more, and one of them twice")
    generator = np.random.default_rng(seed)
    rows = []
    for same, (start, end) in partners.items():
        after = np.cumsum(end - start)  # numbers of pairs up to and with image i
        number = generator.choice(totals[same], count, replace=False)
        first = np.searchsorted(after, number, side="right")
        second = end[first] - (after[first] - number)
        rows.append(np.sort(np.stack([order[first], order[second]]), axis=0))
    shuffle = generator.permutation(2 * count)
    first, second = torch.as_tensor(np.concatenate(rows, axis=1)[:, shuffle])
    return Pairs(first, second, torch.as_tensor(shuffle < count))
