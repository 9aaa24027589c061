"""1:1 verification: is it the same person? The figures that the field reports of scored pairs.

A score is greater for a more similar pair (it is a negated distance), and a pair is accepted when its score is at least
the threshold. scikit-learn makes the curves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..base.extras import require
from .distances import Cosine, Distance
from .pairs import Pairs, balanced_pairs

Floats = npt.NDArray[np.float64]

FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""False accept rates that are reported."""

# Pairs whose rows are held at once: all of them would be many times the embeddings.
_PAIRS_AT_ONCE = 4096


@torch.no_grad()
def pair_scores(embeddings: Tensor, pairs: Pairs, distance: Distance = Cosine()) -> Floats:
    """Negated distance of each pair ``(P,)``, from embeddings ``(M, D)``.

    >>> embeddings = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> pair_scores(embeddings, Pairs(torch.tensor([0]), torch.tensor([1]), torch.tensor([False])))
    array([-1.])
    """
    transformed = distance.transform(embeddings.float())
    parts = zip(pairs.first.split(_PAIRS_AT_ONCE), pairs.second.split(_PAIRS_AT_ONCE), strict=True)
    distances = torch.cat([distance.of_transformed(transformed[i], transformed[j]) for i, j in parts])
    scores: Floats = -distances.double().cpu().numpy()
    return scores


def roc(same: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[Floats, Floats, Floats]:
    """False and true accept rates and their thresholds, descending, every point of the curve kept.

    Raises:
        ValueError: all pairs are of one kind, or a score is not finite.
        MissingExtra: scikit-learn is not installed.

    >>> false_accepts, true_accepts, thresholds = roc([True, False, True], [0.9, 0.5, 0.1])
    >>> true_accepts
    array([0. , 0.5, 0.5, 1. ])
    """
    same, scores = np.asarray(same, dtype=bool), np.asarray(scores, dtype=np.float64)
    if same.all() or not same.any():
        raise ValueError("same must hold pairs of both kinds")
    _check_finite(scores)
    # Dropped points are those on straight lines, where the greatest rate below a given FAR may lie.
    false_accepts, true_accepts, thresholds = require("sklearn.metrics", "eval").roc_curve(
        same, scores, drop_intermediate=False
    )
    return false_accepts, true_accepts, thresholds


def _check_finite(scores: Floats) -> None:
    if not np.isfinite(scores).all():
        raise ValueError(f"scores must be finite; {int((~np.isfinite(scores)).sum())} are not")


def mean_scores(same: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[float | None, float | None]:
    """Mean score of the pairs of one identity, and of those of two; None where there are none.

    >>> mean_scores([True, True], [0.5, 0.25])
    (0.375, None)
    """
    same, scores = np.asarray(same, dtype=bool), np.asarray(scores, dtype=np.float64)
    _check_finite(scores)
    one, two = (float(scores[kind].mean()) if kind.any() else None for kind in (same, ~same))
    return one, two


def tar_at_far(same: npt.ArrayLike, scores: npt.ArrayLike, far: float) -> float:
    """Greatest true accept rate whose false accept rate is at most ``far``: nothing is interpolated.

    >>> tar_at_far([True, True, False, False], [0.9, 0.4, 0.5, 0.1], far=0.01)
    0.5
    """
    if not 0 <= far <= 1:
        raise ValueError(f"far must be in [0, 1]; got {far}")
    false_accepts, true_accepts, _ = roc(same, scores)
    return _greatest_rate(false_accepts, true_accepts, far)


def _greatest_rate(false_accepts: Floats, true_accepts: Floats, far: float) -> float:
    return float(true_accepts[false_accepts <= far].max())


def equal_error_rate(false_accepts: Floats, true_accepts: Floats) -> float:
    """Mean of the false accept and the false reject rate at the point of a curve ``(points,)`` where they are closest.

    >>> equal_error_rate(*roc([True, True, False, False], [0.9, 0.4, 0.5, 0.1])[:2])
    0.5
    """
    false_rejects = 1 - true_accepts
    closest = np.argmin(np.abs(false_rejects - false_accepts))
    return float(false_accepts[closest] + false_rejects[closest]) / 2


def k_fold_accuracy(
    same: npt.ArrayLike, scores: npt.ArrayLike, folds: int = 10, thresholds: npt.ArrayLike | None = None
) -> Floats:
    """Accuracy on each fold ``(folds,)`` with the threshold that is best on all the others, as LFW is scored.

    The folds are consecutive parts of the pairs as they are given. Of equally good thresholds the greatest is taken.

    Args:
        same: (P,) bool.
        scores: (P,).
        folds: at least 2.
        thresholds: to choose from; None for every score, which is never worse on the folds it is chosen on. insightface
            chooses from 400, ``-numpy.arange(0, 4, 0.01)`` for scores that are negated *squared* Euclidean distances.

    Raises:
        ValueError: fewer pairs than folds, or fewer than two folds.

    >>> k_fold_accuracy([True, False] * 4, [0.9, 0.2, 0.8, 0.1, 0.7, 0.3, 0.2, 0.4], folds=4)
    array([1. , 1. , 0.5, 0.5])
    """
    same, scores = np.asarray(same, dtype=bool), np.asarray(scores, dtype=np.float64)
    if not 2 <= folds <= len(same):
        raise ValueError(f"{folds} folds must be >= 2 and <= the number of pairs; there are {len(same)} pairs")
    _check_finite(scores)
    accuracies = []
    for test in np.array_split(np.arange(len(same)), folds):
        train = np.ones(len(same), dtype=bool)
        train[test] = False
        chosen_from = scores[train] if thresholds is None else np.asarray(thresholds, dtype=np.float64)
        # Above all scores no pair is accepted.
        candidates = np.r_[np.inf if thresholds is None else [], np.unique(chosen_from)[::-1]]
        threshold = candidates[np.argmax(_right(same[train], scores[train], candidates))]
        accuracies.append(np.mean((scores[test] >= threshold) == same[test]))
    return np.array(accuracies)


def _right(same: npt.NDArray[np.bool_], scores: Floats, thresholds: Floats) -> npt.NDArray[np.int64]:
    """Pairs that each threshold judges rightly."""
    below = {kind: np.searchsorted(np.sort(scores[same == kind]), thresholds) for kind in (True, False)}
    return below[False] + int(same.sum()) - below[True]


@dataclass(frozen=True)
class Verification:
    """The figures of one verification."""

    fold_accuracy: Floats
    """(10,), see :func:`k_fold_accuracy`."""
    tar: dict[float, float]
    """True accept rate by false accept rate."""
    eer: float
    """See :func:`equal_error_rate`."""
    false_accepts: Floats
    """(points,) the curve."""
    true_accepts: Floats
    """(points,)."""
    num_pairs: tuple[int, int]
    """Of one identity, and of two: a FAR below one over the second is a FAR of 0."""

    @property
    def accuracy(self) -> float:
        """Mean over the folds."""
        return float(self.fold_accuracy.mean())

    @property
    def accuracy_deviation(self) -> float:
        """Population deviation over the folds: insightface's "±"."""
        return float(self.fold_accuracy.std())

    @property
    def accuracy_standard_error(self) -> float:
        """Of the mean over the folds: FaceX-Zoo's "±"."""
        return float(self.fold_accuracy.std(ddof=1) / len(self.fold_accuracy) ** 0.5)


def verify_scores(
    same: npt.ArrayLike, scores: npt.ArrayLike, *, fars: Sequence[float] = FARS, folds: int = 10
) -> Verification:
    """Every figure of scored pairs ``(P,)``.

    >>> found = verify_scores([True, False] * 10, [0.9, 0.1] * 10)
    >>> found.accuracy, found.eer, found.tar[1e-6]
    (1.0, 0.0, 1.0)
    """
    same = np.asarray(same, dtype=bool)
    false_accepts, true_accepts, _ = roc(same, scores)
    return Verification(
        fold_accuracy=k_fold_accuracy(same, scores, folds),
        tar={far: _greatest_rate(false_accepts, true_accepts, far) for far in fars},
        eer=equal_error_rate(false_accepts, true_accepts),
        false_accepts=false_accepts,
        true_accepts=true_accepts,
        num_pairs=(int(same.sum()), int((~same).sum())),
    )


def verify(
    embeddings: Tensor,
    labels: Tensor,
    *,
    distance: Distance = Cosine(),
    fars: Sequence[float] = FARS[:3],
    most_pairs: int = 20_000,
    seed: int = 0,
) -> Verification:
    """Verification on balanced pairs of labeled embeddings.

    Args:
        embeddings: (M, D), of people never seen in training.
        labels: (M,).
        distance: that pairs are compared by.
        fars: false accept rates to report.
        most_pairs: of each kind.
        seed: of the choice of pairs.

    >>> labels = torch.arange(6).repeat_interleave(3)
    >>> verify(torch.eye(6)[labels], labels).accuracy
    1.0
    """
    pairs = balanced_pairs(labels, most_pairs, seed)
    return verify_scores(pairs.same.numpy(), pair_scores(embeddings, pairs, distance), fars=fars)
