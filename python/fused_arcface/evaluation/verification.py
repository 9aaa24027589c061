"""1:1 verification (is it the same person?): the usual figures of scored pairs.

A score is greater for a more similar pair: it is a negated distance. A pair is accepted if its score is at least the
threshold. scikit-learn makes the curves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..base.extras import require
from .distances import Cosine, Distance
from .pairs import Pairs, balanced_pairs

Floats = npt.NDArray[np.float64]
Values = npt.ArrayLike | Tensor
"""Numbers of pairs (P,): a list, an array, or a tensor on any device."""

FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""False accept rates that are reported."""

# Pairs that are compared at once: the embeddings of all pairs would be many times larger than those of the images.
_PAIRS_AT_ONCE = 4096


@torch.no_grad()
def pair_scores(embeddings: Tensor, pairs: Pairs, distance: Distance = Cosine()) -> Floats:
    """Return the negated distance of each pair ``(P,)``, given embeddings ``(M, D)``.

    >>> embeddings = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> pair_scores(embeddings, Pairs(torch.tensor([0]), torch.tensor([1]), torch.tensor([False])))
    array([-1.])
    """
    transformed = distance.transform(embeddings.float())
    # Filled in place: small results in a list, between large temporary tensors, would fragment the heap.
    distances = torch.empty(len(pairs.first), device=transformed.device)
    for start in range(0, len(distances), _PAIRS_AT_ONCE):
        first, second = (each[start : start + _PAIRS_AT_ONCE] for each in (pairs.first, pairs.second))
        distances[start : start + len(first)] = distance.of_transformed(transformed[first], transformed[second])
    return -distances.double().cpu().numpy()


def roc(same: Values, scores: Values) -> tuple[Floats, Floats, Floats]:
    """Return false and true accept rates and their descending thresholds, with every point of the curve.

    Args:
        same: true for each pair that shows one identity, (P,) bool.
        scores: similarity of each pair, (P,).

    Raises:
        ValueError: if all pairs are of one kind, or a score is not finite.
        MissingExtra: if scikit-learn is not installed.

    >>> false_accepts, true_accepts, thresholds = roc([True, False, True], [0.9, 0.5, 0.1])
    >>> true_accepts
    array([0. , 0.5, 0.5, 1. ])
    """
    same, scores = scored_pairs(same, scores)
    if same.all() or not same.any():
        raise ValueError("same must hold pairs of both kinds")
    # By default points on straight lines are dropped; the greatest rate below a given FAR may be one of them.
    false_accepts, true_accepts, thresholds = require("sklearn.metrics", "eval").roc_curve(
        same, scores, drop_intermediate=False
    )
    return false_accepts, true_accepts, thresholds


def scored_pairs(same: Values, scores: Values) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Return both as arrays (P,), bool and fp64; raise ValueError for other shapes, or a score that is not finite."""
    kinds, values = _array(same).astype(bool), _array(scores).astype(np.float64)
    if kinds.ndim != 1 or kinds.shape != values.shape:
        raise ValueError(f"same and scores must be (P,); got {kinds.shape} and {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"scores must be finite; {int((~np.isfinite(values)).sum())} are not")
    return kinds, values


def _array(values: Values) -> npt.NDArray[Any]:
    """Return numbers as an array; a tensor may be on a GPU, in bf16, or have a gradient."""
    return values.detach().double().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def check_rates(name: str, rates: Sequence[float]) -> None:
    """Raise ValueError unless all rates are in [0, 1]."""
    if not all(0 <= rate <= 1 for rate in rates):
        raise ValueError(f"{name} must be in [0, 1]; got {list(rates)}")


def mean_scores(same: Values, scores: Values) -> tuple[float | None, float | None]:
    """Return the mean scores of the pairs of one identity and of the pairs of two; None if there are no such pairs.

    >>> mean_scores([True, True], [0.5, 0.25])
    (0.375, None)
    """
    same, scores = scored_pairs(same, scores)
    one, two = (float(scores[kind].mean()) if kind.any() else None for kind in (same, ~same))
    return one, two


def tar_at_far(same: Values, scores: Values, far: float) -> float:
    """Return the greatest true accept rate with a false accept rate of at most ``far``; nothing is interpolated.

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
    """Return the mean of false accept and false reject rate where they are closest on a curve ``(points,)``.

    >>> equal_error_rate(*roc([True, True, False, False], [0.9, 0.4, 0.5, 0.1])[:2])
    0.5
    """
    false_rejects = 1 - true_accepts
    closest = np.argmin(np.abs(false_rejects - false_accepts))
    return float(false_accepts[closest] + false_rejects[closest]) / 2


def check_folds(folds: int, pairs: int) -> None:
    """Raise ValueError unless a number of pairs can be cut into so many folds, at least two."""
    if not 2 <= folds <= pairs:
        raise ValueError(f"folds must be >= 2 and <= the number of pairs {pairs}; got {folds}")


def k_fold_accuracy(same: Values, scores: Values, folds: int = 10, thresholds: Values | None = None) -> Floats:
    """Return the accuracy on each fold ``(folds,)`` with the threshold that is best on all others, as LFW is scored.

    The folds are consecutive parts of the pairs as they are given. If several thresholds are equally good, the greatest
    is taken.

    Args:
        same: true for each pair that shows one identity, (P,) bool.
        scores: similarity of each pair, (P,).
        folds: number of folds, at least 2.
        thresholds: values to choose from; None for every score, which is never worse on the other folds. insightface
            chooses from 400, ``-numpy.arange(0, 4, 0.01)`` for scores that are negated *squared* Euclidean distances.

    Raises:
        ValueError: if there are fewer pairs than folds, or fewer than two folds.

    >>> k_fold_accuracy([True, False] * 4, [0.9, 0.2, 0.8, 0.1, 0.7, 0.3, 0.2, 0.4], folds=4)
    array([1. , 1. , 0.5, 0.5])
    """
    same, scores = scored_pairs(same, scores)
    check_folds(folds, len(same))
    accuracies = []
    for test in np.array_split(np.arange(len(same)), folds):
        train = np.ones(len(same), dtype=bool)
        train[test] = False
        chosen_from = scores[train] if thresholds is None else _array(thresholds).astype(np.float64)
        # Above all scores no pair is accepted.
        candidates = np.r_[np.inf if thresholds is None else [], np.unique(chosen_from)[::-1]]
        threshold = candidates[np.argmax(_right(same[train], scores[train], candidates))]
        accuracies.append(np.mean((scores[test] >= threshold) == same[test]))
    return np.array(accuracies)


def _right(same: npt.NDArray[np.bool_], scores: Floats, thresholds: Floats) -> npt.NDArray[np.int64]:
    """Return the number of pairs that each threshold judges correctly."""
    below = {kind: np.searchsorted(np.sort(scores[same == kind]), thresholds) for kind in (True, False)}
    return below[False] + int(same.sum()) - below[True]


@dataclass(frozen=True)
class Rates:
    """Accept rates of scored pairs over all thresholds."""

    tar: dict[float, float]
    """True accept rate by false accept rate."""
    eer: float
    """Equal error rate, see :func:`equal_error_rate`."""
    false_accepts: Floats
    """False accept rates of the curve, (points,), ascending, without points inside a level part."""
    true_accepts: Floats
    """True accept rates of the curve, (points,)."""
    num_pairs: tuple[int, int]
    """Numbers of pairs of one identity and of two. A FAR below 1 / the second number is the same as 0."""


@dataclass(frozen=True)
class Verification(Rates):
    """The figures of one verification: accept rates, and the accuracy over folds."""

    fold_accuracy: Floats
    """Accuracy of each fold, (folds,); see :func:`k_fold_accuracy`."""

    @property
    def accuracy(self) -> float:
        """Mean accuracy over the folds."""
        return float(self.fold_accuracy.mean())

    @property
    def accuracy_deviation(self) -> float:
        """Population deviation over the folds: insightface's "±"."""
        return float(self.fold_accuracy.std())

    @property
    def accuracy_standard_error(self) -> float:
        """Standard error of the mean over the folds: FaceX-Zoo's "±"."""
        return float(self.fold_accuracy.std(ddof=1) / len(self.fold_accuracy) ** 0.5)


def accept_rates(same: Values, scores: Values, *, fars: Sequence[float] = FARS) -> Rates:
    """Compute the accept rates of scored pairs.

    Args:
        same: true for each pair that shows one identity, (P,) bool.
        scores: similarity of each pair, (P,).
        fars: false accept rates to report, in [0, 1].

    Raises:
        ValueError: if all pairs are of one kind, a score is not finite, or a rate is outside [0, 1].
        MissingExtra: if scikit-learn is not installed.

    >>> accept_rates([True, True, False, False], [0.9, 0.4, 0.5, 0.1], fars=[0.01]).tar
    {0.01: 0.5}
    """
    check_rates("fars", fars)
    same, scores = scored_pairs(same, scores)
    false_accepts, true_accepts, _ = roc(same, scores)
    # Millions of pairs of two identities are as many points, nearly all of them on level parts.
    rises = np.diff(true_accepts) != 0
    kept = np.r_[True, rises] | np.r_[rises, True]
    return Rates(
        tar={far: _greatest_rate(false_accepts, true_accepts, far) for far in fars},
        eer=equal_error_rate(false_accepts, true_accepts),
        false_accepts=false_accepts[kept],
        true_accepts=true_accepts[kept],
        num_pairs=(int(same.sum()), int((~same).sum())),
    )


def verify_scores(same: Values, scores: Values, *, fars: Sequence[float] = FARS, folds: int = 10) -> Verification:
    """Compute every figure of scored pairs.

    Args:
        same: true for each pair that shows one identity, (P,) bool.
        scores: similarity of each pair, (P,).
        fars: false accept rates to report, in [0, 1].
        folds: number of folds of the accuracy.

    Raises:
        ValueError: if all pairs are of one kind, there are fewer than folds, a score is not finite, or a rate is
            outside [0, 1].
        MissingExtra: if scikit-learn is not installed.

    >>> found = verify_scores([True, False] * 10, [0.9, 0.1] * 10)
    >>> found.accuracy, found.eer, found.tar[1e-6]
    (1.0, 0.0, 1.0)
    """
    rates = accept_rates(same, scores, fars=fars)
    return Verification(**vars(rates), fold_accuracy=k_fold_accuracy(same, scores, folds))


def verify(
    embeddings: Tensor,
    labels: Tensor,
    *,
    distance: Distance = Cosine(),
    fars: Sequence[float] = FARS[:3],
    most_pairs: int = 20_000,
    seed: int = 0,
) -> Verification:
    """Verify balanced pairs of labeled embeddings.

    Args:
        embeddings: embeddings (M, D) of people never seen in training.
        labels: identities (M,).
        distance: distance that pairs are compared by.
        fars: false accept rates to report.
        most_pairs: greatest number of pairs of each kind.
        seed: seed of the choice of pairs.

    Raises:
        ValueError: if the shapes do not fit, or the labels allow no pairs of both kinds.
        MissingExtra: if scikit-learn is not installed.

    >>> labels = torch.arange(6).repeat_interleave(3)
    >>> verify(torch.eye(6)[labels], labels).accuracy
    1.0
    """
    if embeddings.dim() != 2 or labels.shape != embeddings.shape[:1]:
        shapes = f"{tuple(embeddings.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"embeddings and labels must be (M, D) and (M,); got {shapes}")
    pairs = balanced_pairs(labels, most_pairs, seed)
    return verify_scores(pairs.same.numpy(), pair_scores(embeddings, pairs, distance), fars=fars)
