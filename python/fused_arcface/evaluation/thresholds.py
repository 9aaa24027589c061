"""Thresholds of 1:1 verification: the score from which a pair counts as one person, and the errors that follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .verification import FARS, Values, check_rates, roc, scored_pairs

BEST_ACCURACY = "best accuracy"
EQUAL_ERROR_RATE = "equal error rate"


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold and its rates on the pairs that it was chosen on."""

    name: str
    """``"best accuracy"``, ``"equal error rate"`` or ``"FAR 0.001"``."""
    threshold: float
    """Pairs of at least this score are accepted; infinite if none may be."""
    false_accept_rate: float
    """Share of the pairs of two people that are accepted."""
    true_accept_rate: float
    """Share of the pairs of one person that are accepted."""
    accuracy: float
    """Share of all pairs that are judged correctly."""


def far_name(far: float) -> str:
    """Return the name of the point at a false accept rate.

    >>> far_name(1e-3)
    'FAR 0.001'
    """
    return f"FAR {far:g}"


def operating_points(same: Values, scores: Values, *, fars: Sequence[float] = FARS) -> list[OperatingPoint]:
    """Return the thresholds that people act on: best accuracy, equal error rate, and one for each false accept rate.

    A threshold is a score of one of the pairs. If several are equally good, the greatest is taken. At the threshold of
    a false accept rate the pairs have at most this rate, as in :func:`fused_arcface.evaluation.tar_at_far`. Nothing is
    interpolated.

    Args:
        same: (P,) bool, true for pairs of one person.
        scores: (P,), greater for more similar pairs.
        fars: false accept rates, in [0, 1].

    Raises:
        ValueError: if all pairs are of one kind, a score is not finite, or a rate is outside [0, 1].
        MissingExtra: if scikit-learn is not installed.

    >>> points = operating_points([True, True, False, False], [0.9, 0.4, 0.5, 0.1], fars=[0.01])
    >>> [(point.name, point.threshold) for point in points]
    [('best accuracy', 0.9), ('equal error rate', 0.5), ('FAR 0.01', 0.9)]
    """
    check_rates("fars", fars)
    same, scores = scored_pairs(same, scores)
    false_accepts, true_accepts, thresholds = roc(same, scores)
    # In whole pairs: rounding must not choose between thresholds that are equally good.
    ones, others = int(same.sum()), int((~same).sum())
    accuracy = np.rint(ones * true_accepts + others * (1 - false_accepts)) / len(same)

    def point(name: str, place: int) -> OperatingPoint:
        rates = (float(each[place]) for each in (thresholds, false_accepts, true_accepts, accuracy))
        return OperatingPoint(name, *rates)

    closest = int(np.argmin(np.abs(1 - true_accepts - false_accepts)))
    found = [point(BEST_ACCURACY, int(np.argmax(accuracy))), point(EQUAL_ERROR_RATE, closest)]
    for far in fars:
        allowed = np.where(false_accepts <= far, true_accepts, -1.0)
        found.append(point(far_name(far), int(np.argmax(allowed))))
    return found
