"""1:1 verification: is it the same person? Pairs, their scores, and the figures that the field reports.

A score is greater for a more similar pair, and a pair is accepted when its score is at least the threshold.
scikit-learn makes the curves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ..extras import require

Floats = npt.NDArray[np.float64]


class Pairs(NamedTuple):
    """Pairs of images by their numbers."""

    first: Tensor
    """(P,) int64."""
    second: Tensor
    """(P,) int64."""
    same: Tensor
    """(P,) bool: both show the same identity."""


def balanced_pairs(labels: Tensor, most: int = 20_000, seed: int = 0) -> Pairs:
    """As many pairs of one identity as of two, in random order, none twice.

    Args:
        labels: (M,) who is on each image.
        most: pairs of each kind at most; fewer where there are not so many.
        seed: of the choice.

    Raises:
        ValueError: no identity has two images, or there is only one identity.

    >>> balanced_pairs(torch.tensor([0, 0, 1])).same.sort().values
    tensor([False,  True])
    """
    first, second = torch.triu_indices(len(labels), len(labels), offset=1)
    same = labels[first] == labels[second]
    count = min(most, int(same.sum()), int((~same).sum()))
    if count == 0:
        raise ValueError("labels must hold two identities or more, and one of them twice")
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for kind in (same, ~same):
        rows = kind.nonzero()[:, 0]
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    order = torch.cat(chosen)[torch.randperm(2 * count, generator=generator)]
    return Pairs(first[order], second[order], same[order])


def pair_cosines(embeddings: Tensor, pairs: Pairs) -> Floats:
    """Cosine of each pair ``(P,)``, from embeddings ``(M, D)`` of any norm."""
    unit = F.normalize(embeddings.float())
    # In parts: all pairs' rows at once would be many times the embeddings.
    parts = zip(pairs.first.split(4096), pairs.second.split(4096), strict=True)
    cosines: Floats = torch.cat([(unit[i] * unit[j]).sum(1) for i, j in parts]).double().cpu().numpy()
    return cosines


def roc(same: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[Floats, Floats, Floats]:
    """False and true accept rates and their thresholds, descending, every point of the curve kept.

    Raises:
        ValueError: all pairs are of one kind, or a score is not finite.
        MissingExtra: scikit-learn is not installed.
    """
    same, scores = np.asarray(same, dtype=bool), np.asarray(scores, dtype=np.float64)
    if same.all() or not same.any():
        raise ValueError("same must hold pairs of both kinds")
    if not np.isfinite(scores).all():
        raise ValueError(f"scores must be finite; {int((~np.isfinite(scores)).sum())} are not")
    # Dropped points are those on straight lines, where the greatest rate below a given FAR may lie.
    false_accepts, true_accepts, thresholds = require("sklearn.metrics").roc_curve(
        same, scores, drop_intermediate=False
    )
    return false_accepts, true_accepts, thresholds


def tar_at_far(same: npt.ArrayLike, scores: npt.ArrayLike, far: float) -> float:
    """Greatest true accept rate whose false accept rate is at most ``far``: nothing is interpolated.

    >>> tar_at_far([True, True, False, False], [0.9, 0.4, 0.5, 0.1], far=0.01)
    0.5
    """
    if not 0 <= far <= 1:
        raise ValueError(f"far must be in [0, 1]; got {far}")
    false_accepts, true_accepts, _ = roc(same, scores)
    return float(true_accepts[false_accepts <= far].max())


def k_fold_accuracy(same: npt.ArrayLike, scores: npt.ArrayLike, folds: int = 10) -> Floats:
    """Accuracy on each fold ``(folds,)`` with the threshold that is best on all the others, as LFW is scored.

    The folds are consecutive parts of the pairs as they are given. Of equally good thresholds the greatest is taken.

    Raises:
        ValueError: fewer pairs than folds, fewer than two folds, or pairs of one kind only.
    """
    same, scores = np.asarray(same, dtype=bool), np.asarray(scores, dtype=np.float64)
    accuracies = []
    for train, test in require("sklearn.model_selection").KFold(folds).split(scores):
        false_accepts, true_accepts, thresholds = roc(same[train], scores[train])
        positives = int(same[train].sum())
        right = true_accepts * positives + (1 - false_accepts) * (len(train) - positives)
        # Counts are whole: rounded, or equal ones would differ by the rounding of the rates.
        threshold = thresholds[np.argmax(np.rint(right))]
        accuracies.append(np.mean((scores[test] >= threshold) == same[test]))
    return np.array(accuracies)


@dataclass(frozen=True)
class Verification:
    """The figures of one verification."""

    accuracy: float
    """Mean over the folds."""
    accuracy_deviation: float
    """Population deviation over the folds."""
    tar: dict[float, float]
    """True accept rate by false accept rate."""
    false_accepts: Floats
    """(points,) the curve."""
    true_accepts: Floats
    """(points,)."""


def verify(
    embeddings: Tensor, labels: Tensor, *, fars: tuple[float, ...] = (1e-1, 1e-2, 1e-3), seed: int = 0
) -> Verification:
    """Verification on balanced pairs of labelled embeddings.

    Args:
        embeddings: (M, D), of people never seen in training.
        labels: (M,).
        fars: false accept rates to report.
        seed: of the choice of pairs.
    """
    pairs = balanced_pairs(labels, seed=seed)
    same, scores = pairs.same.cpu().numpy(), pair_cosines(embeddings, pairs)
    false_accepts, true_accepts, _ = roc(same, scores)
    accuracy = k_fold_accuracy(same, scores)
    return Verification(
        accuracy=float(accuracy.mean()),
        accuracy_deviation=float(accuracy.std()),
        tar={far: float(true_accepts[false_accepts <= far].max()) for far in fars},
        false_accepts=false_accepts,
        true_accepts=true_accepts,
    )
