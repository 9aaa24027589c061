"""Verification: pairs, rates and accuracy against computations by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("sklearn")

from fused_arcface.evaluation import (
    Cosine,
    Euclidean,
    Pairs,
    balanced_pairs,
    equal_error_rate,
    k_fold_accuracy,
    pair_scores,
    roc,
    tar_at_far,
    verify,
    verify_scores,
)

# Few different values, so that scores are tied.
scored_pairs = st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=2, max_size=40).filter(
    lambda pairs: 0 < sum(same for same, _ in pairs) < len(pairs)
)


def greatest_rate(same: np.ndarray, scores: np.ndarray, far: float) -> float:
    """The definition: over every threshold, the one that accepts nobody included."""
    rates = [0.0]
    for threshold in scores:
        accepted = scores >= threshold
        if accepted[~same].mean() <= far:
            rates.append(accepted[same].mean())
    return max(rates)


@pytest.mark.slow
@given(scored_pairs, st.sampled_from([0, 0.01, 0.1, 0.25, 1 / 3, 0.5, 1]))
def test_tar_at_far_is_the_greatest_rate_allowed(pairs: list[tuple[bool, int]], far: float) -> None:
    same, scores = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs], dtype=float)
    assert tar_at_far(same, scores, far) == greatest_rate(same, scores, far)


def test_tar_at_far_keeps_points_on_straight_lines() -> None:
    # Descending, the accepted are T F T F T F: a curve without its collinear points has none at a FAR of 1/3.
    same, scores = [True, False] * 3, [6, 5, 4, 3, 2, 1]
    assert tar_at_far(same, scores, 0.34) == pytest.approx(2 / 3)
    same, scores = [True, True, True, False], [4, 3, 2, 1]
    assert len(roc(same, scores)[0]) == 5


def test_nothing_is_interpolated() -> None:
    assert tar_at_far([True, False, True, False], [4, 3, 2, 1], 0.49) == 0.5


@pytest.mark.parametrize(
    ("same", "scores", "message"),
    [
        ([True, True], [1.0, 2.0], "same must hold pairs of both kinds"),
        ([True, False], [1.0, np.nan], "scores must be finite; 1 are not"),
    ],
)
def test_curves_that_cannot_be(same: list[bool], scores: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roc(same, scores)


def test_far_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"far must be in \[0, 1\]; got 2"):
        tar_at_far([True, False], [1, 0], 2)


@pytest.mark.parametrize("folds", [2, 10])
def test_k_fold_accuracy_takes_its_threshold_from_the_other_folds(folds: int) -> None:
    generator = np.random.default_rng(folds)
    same = generator.random(203) < 0.5
    scores = np.round(generator.normal(size=203) + same, 1)  # ties
    expected, bounds = [], np.cumsum([0] + [203 // folds + (fold < 203 % folds) for fold in range(folds)])
    for start, stop in itertools.pairwise(bounds):
        test = np.zeros(203, dtype=bool)
        test[start:stop] = True
        candidates = [np.inf, *sorted(set(scores[~test]), reverse=True)]
        right = [((scores[~test] >= threshold) == same[~test]).sum() for threshold in candidates]
        threshold = candidates[int(np.argmax(right))]
        expected.append(((scores[test] >= threshold) == same[test]).mean())
    assert k_fold_accuracy(same, scores, folds).tolist() == expected


def test_a_fold_is_not_scored_with_its_own_threshold() -> None:
    # The second half is shifted: each half's best threshold is useless in the other.
    same, scores = [False, True] * 10, np.array([0.0, 1] * 5 + [2.0, 3] * 5)
    assert k_fold_accuracy(same, scores, folds=2).tolist() == [0.5, 0.5]


def test_pairs_are_balanced_different_and_reproducible() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    pairs = balanced_pairs(labels)
    assert pairs.same.sum() == 4 and len(pairs.same) == 8  # three of identity 0 and one of identity 1
    assert (labels[pairs.first] == labels[pairs.second]).equal(pairs.same)
    assert (pairs.first < pairs.second).all()
    assert len(set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))) == 8
    assert all(a.equal(b) for a, b in zip(pairs, balanced_pairs(labels), strict=True))
    assert len(balanced_pairs(labels, most=2).same) == 4
    for hopeless in ([0, 0], [0, 1]):
        with pytest.raises(ValueError, match="labels must hold two identities or more"):
            balanced_pairs(torch.tensor(hopeless))


def test_cosines_do_not_depend_on_norms() -> None:
    embeddings = torch.tensor([[3.0, 0], [0.1, 0.1], [0, -2.0]])
    pairs = balanced_pairs(torch.tensor([0, 0, 1]))
    cosines = dict(
        zip(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True), pair_scores(embeddings, pairs), strict=True)
    )
    assert cosines[0, 1] == pytest.approx(0.5**0.5 - 1)


def test_verify_tells_perfect_from_random() -> None:
    labels = torch.arange(40).repeat_interleave(5)
    perfect = verify(torch.eye(40)[labels], labels)
    assert perfect.accuracy == 1 and perfect.accuracy_deviation == 0 and set(perfect.tar.values()) == {1.0}
    chance = verify(torch.randn(200, 16), labels)
    assert 0.4 < chance.accuracy < 0.6 and chance.tar[1e-2] < 0.06
    assert chance.tar[1e-2] == tar_at_far(*_scored(labels), 1e-2)


def _scored(labels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    torch.manual_seed(0)
    pairs = balanced_pairs(labels)
    return pairs.same.numpy(), pair_scores(torch.randn(200, 16), pairs)


def test_pairs_of_many_images_are_drawn_evenly_and_never_twice() -> None:
    labels = torch.randint(0, 3000, (30_000,))  # 4.5e8 pairs: more than may be listed
    pairs = balanced_pairs(labels, most=5000, seed=3)
    assert len(pairs.same) == 10_000 and pairs.same.sum() == 5000
    assert (labels[pairs.first] == labels[pairs.second]).equal(pairs.same)
    assert (pairs.first < pairs.second).all()
    assert len(set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))) == 10_000
    # Each image is as likely as any other in a pair of two identities: the mean number is that of the middle.
    numbers = torch.cat([pairs.first[~pairs.same], pairs.second[~pairs.same]]).double()
    assert abs(numbers.mean() - 14_999.5) < 4 * 30_000 / 12**0.5 / 100


def test_all_pairs_are_found_when_all_are_asked_for() -> None:
    labels = torch.tensor([4, 9, 4, 9])
    pairs = balanced_pairs(labels)
    expected = {(0, 2, True), (1, 3, True)}
    found = set(zip(pairs.first.tolist(), pairs.second.tolist(), pairs.same.tolist(), strict=True))
    assert expected < found and len(found) == 4


@pytest.mark.slow
def test_random_scores_against_a_computation_by_hand() -> None:
    rng = np.random.default_rng(0)
    same = rng.random(1000) < 0.4
    scores = rng.normal(size=1000) + same
    found = verify_scores(same, scores)
    from sklearn.metrics import accuracy_score, roc_curve
    from sklearn.model_selection import KFold

    accuracies = []
    for train, test in KFold(10).split(scores):
        candidates = np.unique(scores[train])[::-1]
        threshold = max(candidates, key=lambda t: (accuracy_score(same[train], scores[train] >= t), t))
        accuracies.append(accuracy_score(same[test], scores[test] >= threshold))
    assert found.fold_accuracy == pytest.approx(accuracies, abs=1e-15)
    assert found.accuracy_deviation == pytest.approx(np.std(accuracies))
    assert found.accuracy_standard_error == pytest.approx(np.std(accuracies, ddof=1) / 10**0.5)
    assert found.num_pairs == (same.sum(), (~same).sum())
    fpr, tpr, _ = roc_curve(same, scores, drop_intermediate=False)
    for far, tar in found.tar.items():
        assert tar == max(t for f, t in zip(fpr, tpr, strict=True) if f <= far) == greatest_rate(same, scores, far)
    assert list(found.tar) == [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]


def test_equal_error_rate_is_torchmetrics() -> None:
    binary_eer = pytest.importorskip("torchmetrics.functional.classification").binary_eer
    torch.manual_seed(1)
    same = torch.rand(500) < 0.5
    scores = torch.sigmoid(torch.randn(500) + 0.7 * same)
    found = equal_error_rate(*roc(same.numpy(), scores.numpy())[:2])
    assert found == pytest.approx(float(binary_eer(scores, same.int())), abs=1e-6)


def test_insightface_grid_of_thresholds() -> None:
    """Its own rule, written out: squared distances below one of 400 thresholds, the first of the best."""
    torch.manual_seed(2)
    same = np.random.default_rng(2).random(600) < 0.5
    squared = np.abs(np.random.default_rng(3).normal(1.2, 0.4, 600)) + 0.5 * ~same
    grid = np.arange(0, 4, 0.01)
    expected = []
    for fold in np.array_split(np.arange(600), 10):
        train = np.setdiff1d(np.arange(600), fold)
        right = [((squared[train] < t) == same[train]).mean() for t in grid]
        expected.append(((squared[fold] < grid[int(np.argmax(right))]) == same[fold]).mean())
    assert k_fold_accuracy(same, -squared, thresholds=-grid) == pytest.approx(expected, abs=1e-15)


def test_the_distance_decides() -> None:
    # By angle the first pair is the closer one, by distance the second.
    embeddings = torch.tensor([[1.0, 0.0], [9.0, 0.0], [0.0, 1.0]])
    pairs = Pairs(torch.tensor([0, 0]), torch.tensor([1, 2]), torch.tensor([True, False]))
    assert tar_at_far(pairs.same, pair_scores(embeddings, pairs, Cosine()), 0) == 1
    assert tar_at_far(pairs.same, pair_scores(embeddings, pairs, Euclidean()), 0) == 0
