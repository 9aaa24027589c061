"""Thresholds of verification, against a search over every possible one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fused_arcface.evaluation import tar_at_far
from fused_arcface.evaluation.thresholds import operating_points


def test_thresholds_by_hand() -> None:
    """Accepting from 0.6 on judges 5 of 6 rightly; from 0.7 on 5 as well, and that is greater."""
    same, scores = [True, True, False, True, False, False], [0.9, 0.7, 0.65, 0.6, 0.3, 0.1]
    best, equal, none, some = operating_points(same, scores, fars=[0.0, 0.4])
    assert (best.name, best.threshold, best.false_accept_rate) == ("best accuracy", 0.7, 0.0)
    assert best.accuracy == pytest.approx(5 / 6) and best.true_accept_rate == pytest.approx(2 / 3)
    assert (equal.name, equal.threshold) == ("equal error rate", 0.65)  # a third of both kinds is wrong
    assert equal.false_accept_rate == pytest.approx(1 / 3) and equal.true_accept_rate == pytest.approx(2 / 3)
    assert (none.name, none.threshold) == ("FAR 0", 0.7)
    assert (some.name, some.threshold, some.true_accept_rate) == ("FAR 0.4", 0.6, 1.0)
    as_tensors = operating_points(torch.tensor(same), torch.tensor(scores, dtype=torch.float64), fars=[0.0, 0.4])
    assert as_tensors == [best, equal, none, some]


def test_no_pair_may_be_accepted() -> None:
    point = operating_points([False, True], [0.9, 0.1], fars=[0.5])[-1]
    assert point.threshold == math.inf and point.true_accept_rate == point.false_accept_rate == 0


def test_thresholds_against_a_search() -> None:
    generator = np.random.default_rng(0)
    same = generator.random(400) < 0.5
    scores = np.round(generator.normal(same * 1.0, 1.0), 2)  # with ties
    fars = (0.3, 0.01)
    best, equal, *at = operating_points(same, scores, fars=fars)
    accuracy = {t: np.mean((scores >= t) == same) for t in np.unique(scores)}
    assert best.accuracy == pytest.approx(max(accuracy.values()))
    assert best.threshold == max(t for t in accuracy if accuracy[t] == max(accuracy.values()))
    for point in (best, equal, *at):
        assert point.accuracy == pytest.approx(np.mean((scores >= point.threshold) == same))
        assert point.false_accept_rate == pytest.approx(np.mean(scores[~same] >= point.threshold))
        assert point.true_accept_rate == pytest.approx(np.mean(scores[same] >= point.threshold))
    for far, point in zip(fars, at, strict=True):
        assert point.false_accept_rate <= far and point.true_accept_rate == tar_at_far(same, scores, far)
    with pytest.raises(ValueError, match=r"fars must be in \[0, 1\]"):
        operating_points(same, scores, fars=[2.0])
