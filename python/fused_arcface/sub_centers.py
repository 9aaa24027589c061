"""Tools for heads with several centers of each class (Sub-center ArcFace, Deng et al., ECCV 2020).

After a training with noisy labels most rows of a class lie near one of its centers, the dominant one. Mislabeled rows
lie near the others, or far from all. The usual steps: count which centers the rows are near (:func:`count_rows`), list
the rows that are far from their class's dominant center (:func:`far_rows`), leave those out, keep one center of each
class (:func:`keep_dominant`), and train on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .base.checks import check_embeddings, check_labels, check_sub_centers, check_target_range, check_weight
from .base.dtypes import compute_dtype
from .base.normalize import unit_rows, without_autocast
from .base.ranges import Range, check_number
from .head import MarginHead
from .partial_fc import PartialFC

__all__ = ["count_rows", "dominant", "far_rows", "keep_dominant", "own_cosines"]

_DEGREES = Range("in [0, 180]", 0, 180, has_high=True)

Batches = Iterable[tuple[Tensor, Tensor]]
"""Pairs of embeddings (n, D) and labels (n,)."""


def own_cosines(embeddings: Tensor, weight: Tensor, labels: Tensor, sub_centers: int) -> Tensor:
    """Return the cosines (n, K) of rows with the K centers of their own class.

    Args:
        embeddings: (n, D).
        weight: (C·K, D), a class's centers one after another.
        labels: (n,) of any integer dtype, in [0, C).
        sub_centers: K, the number of centers of each class.

    Raises:
        TypeError, ValueError: if a type, shape, device or label is wrong.
    """
    check_sub_centers(sub_centers)
    check_weight("weight", weight)
    check_embeddings(embeddings, weight)
    check_labels(labels, embeddings, -100, "labels")
    if len(weight) % sub_centers:
        raise ValueError(f"weight must have a multiple of sub_centers={sub_centers} rows; got {tuple(weight.shape)}")
    labels = labels.long()
    num_classes = len(weight) // sub_centers
    check_target_range(labels, num_classes, None, "labels")
    dtype = compute_dtype(embeddings, weight)
    with without_autocast(embeddings.device):
        centers = unit_rows(weight.unflatten(0, (num_classes, sub_centers))[labels].flatten(0, 1).to(dtype))
        rows = unit_rows(embeddings.to(dtype))
        return (rows[:, None] * centers.unflatten(0, (-1, sub_centers))).sum(2).clamp(-1, 1)


def _all_centers(head: MarginHead | PartialFC) -> Tensor:
    return head.full_weight() if isinstance(head, PartialFC) else head.weight.detach()


@torch.no_grad()
def count_rows(head: MarginHead | PartialFC, batches: Batches) -> Tensor:
    """Return how many rows are nearest to each center of their class, (C_total, K) int64.

    With :class:`fused_arcface.PartialFC` it is a collective: each rank passes its own rows, and gets the counts of all.
    It also gathers all class centers on every rank.

    Args:
        head: a head with ``sub_centers`` of K.
        batches: pairs of embeddings (n, D) and labels (n,).

    >>> import torch, fused_arcface as fa
    >>> head = fa.MarginHead(2, 1, sub_centers=2)
    >>> _ = head.weight.data.copy_(torch.eye(2))
    >>> count_rows(head, [(torch.tensor([[1.0, 0.1], [0.9, 0.0], [0.0, 1.0]]), torch.zeros(3, dtype=torch.int64))])
    tensor([[2, 1]])
    """
    weight, count = _all_centers(head), head.sub_centers
    counts = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
    for embeddings, labels in batches:
        nearest = own_cosines(embeddings, weight, labels, count).argmax(1)
        rows = labels.long() * count + nearest
        counts.index_add_(0, rows, torch.ones_like(rows))
    if isinstance(head, PartialFC):
        counts = head.ranks.sum(counts)
    return counts.unflatten(0, (-1, count))


def dominant(counts: Tensor) -> Tensor:
    """Return the number (C,) of each class's center with the most rows, the first of equals.

    It is 0 for a class without rows.

    >>> dominant(torch.tensor([[2, 1], [0, 3], [0, 0]]))
    tensor([0, 1, 0])
    """
    if counts.dim() != 2:
        raise ValueError(f"counts must be (C, sub_centers); got {tuple(counts.shape)}")
    # argmax may return any of equals.
    return (counts == counts.amax(1, keepdim=True)).int().argmax(1)


def keep_dominant(weight: Tensor, centers: Tensor) -> Tensor:
    """Return one center of each class, (C, D), of weight (C·K, D).

    Args:
        weight: (C·K, D), or the momentum of that shape, or its units.
        centers: (C,) int64 in [0, K): the center to keep, as :func:`dominant` returns it.

    Raises:
        ValueError: if the shapes do not go together, or a number is no center's.

    >>> keep_dominant(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.tensor([1, 0]))
    tensor([[2.],
            [3.]])
    """
    num_classes = len(centers)
    if centers.dim() != 1 or num_classes == 0 or len(weight) % num_classes:
        shapes = f"{tuple(centers.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"centers must be (C,) beside weight (C·K, D); got {shapes}")
    sub_centers = len(weight) // num_classes
    low, high = (int(each) for each in torch.aminmax(centers))
    if low < 0 or high >= sub_centers:
        raise ValueError(f"centers must be in [0, sub_centers={sub_centers}); got {low if low < 0 else high}")
    return weight.unflatten(0, (num_classes, sub_centers))[torch.arange(num_classes, device=weight.device), centers]


@torch.no_grad()
def far_rows(
    head: MarginHead | PartialFC, batches: Batches, centers: Tensor, degrees: float = 75.0
) -> tuple[Tensor, Tensor]:
    """Return the rows that are far from their class's dominant center: their labels are likely wrong.

    Args:
        head: a head with ``sub_centers`` of K. With :class:`fused_arcface.PartialFC` it is a collective.
        batches: pairs of embeddings (n, D) and labels (n,); with ranks, this rank's.
        centers: (C_total,) int64, as :func:`dominant` returns it.
        degrees: angle to the dominant center from which on a row is far, in [0, 180]; the paper leaves out rows beyond
            75°.

    Returns:
        Numbers (M,) int64 of the rows over all batches in their order, and their angles (M,) in degrees.

    >>> import torch, fused_arcface as fa
    >>> head = fa.MarginHead(2, 1, sub_centers=2)
    >>> _ = head.weight.data.copy_(torch.eye(2))
    >>> far_rows(head, [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))], torch.tensor([0]))
    (tensor([1]), tensor([90.]))
    """
    check_number("degrees", degrees, _DEGREES)
    weight, passed = _all_centers(head), 0
    kept = keep_dominant(weight, centers.to(weight.device))
    numbers, angles = [], []
    for embeddings, labels in batches:
        cosine = own_cosines(embeddings, kept, labels, 1).squeeze(1)
        far = (cosine < math.cos(math.radians(degrees))).nonzero().squeeze(1)
        numbers.append(far + passed)
        angles.append(cosine[far].acos().rad2deg())
        passed += len(labels)
    if not numbers:
        return torch.empty(0, dtype=torch.int64, device=weight.device), torch.empty(0, device=weight.device)
    return torch.cat(numbers), torch.cat(angles)
