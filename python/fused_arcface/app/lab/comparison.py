"""The comparison's experiment: train every criterion from every seed, verify and identify with each net.

It prints nothing; a reporter shows its progress.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from fused_arcface.evaluation import (
    Cosine,
    Distance,
    Euclidean,
    InnerProduct,
    Mahalanobis,
    PNorm,
    identify,
    pair_scores,
    split_gallery,
    tar_at_far,
    verify_scores,
)
from fused_arcface.evaluation.pairs import Pairs, balanced_pairs

from ..data import LabeledImages
from ..data.sources import MemoryImages, set_of
from ..measure.child import Child
from ..nets.small import embed
from ..report.digest import hardest_pairs, histograms
from ..report.thumbnails import Thumbnails
from .cost import peak_of_steps
from .criteria import ARCFACE, SOFTMAX, Criterion, criteria
from .plans import Halves, Plan
from .record import LOSSES, ROC_FARS, TAR_FARS, Folder, Row, Toy
from .training import Reporter, TrainedNet, one_thread, train

_FPIR = 0.1

WITH_DISTANCES = (SOFTMAX, ARCFACE)
"""Criteria that are evaluated by every distance, and with hardest pairs."""


@dataclass(frozen=True)
class Comparison:
    """Everything that a comparison found."""

    plan: Plan
    rows: dict[str, list[Row]]
    """By criterion, then by seed."""
    toys: dict[str, Toy]
    """By criterion."""
    seconds: float
    """Time of this run; earlier, interrupted ones are not counted."""


def chosen_criteria(names: Sequence[str]) -> list[Criterion]:
    """Return the criteria of these names, each once, spelled in any case; all if there are none.

    Raises:
        ValueError: if a name is unknown.

    >>> [criterion.name for criterion in chosen_criteria(["arcface", "Softmax", "ArcFace"])]
    ['ArcFace', 'softmax']
    """
    every = criteria()
    spelled = {name.casefold(): criterion for name, criterion in every.items()}
    unknown = [name for name in names if name.casefold() not in spelled]
    if unknown:
        raise ValueError(f"criteria must be among {'; '.join(every)}; got {'; '.join(unknown)}")
    return [spelled[name] for name in dict.fromkeys(map(str.casefold, names))] or [*every.values()]


def run_comparison(plan: Plan, folder: Folder, reporter: Reporter, chosen: Sequence[Criterion]) -> Comparison:
    """Run a plan of one task with some criteria. Continue an earlier run of the same plan.

    Raises:
        DataError: if the plan's data cannot be used.
        MissingExtra: if scikit-learn or pytorch-metric-learning is not installed.
    """
    start = time.perf_counter()
    (task,) = plan.tasks

    @functools.lru_cache(maxsize=1)
    def images_of(seed: int) -> Halves:
        reporter.begin(f"images, seed {seed}")
        return task.images.load(seed)

    rows: dict[str, list[Row]] = {criterion.name: [] for criterion in chosen}
    with one_thread(), Child() as child:
        for seed, criterion in itertools.product(plan.seeds, chosen):
            name = f"{criterion.name}, seed {seed}"
            row = folder.row(criterion.name, seed)
            if row is None:
                images = images_of(seed)
                reporter.begin(name, task.recipe.steps)
                trained = train(criterion, task, images[0], seed, reporter)
                # The peak is the same for each seed, so it is measured for one.
                earlier = folder.row(criterion.name, plan.seeds[0])
                peak = earlier.peak_bytes if earlier else peak_of_steps(criterion.name, task, images[0], child)
                row = _evaluate(criterion.name, seed, trained, peak, images)
                folder.add(row)
            reporter.ended(name, row.first_loss, row.last_loss, task.recipe.steps, row.seconds)
            rows[criterion.name].append(row)
        toys = {criterion.name: _toy(plan, criterion, folder, reporter) for criterion in chosen}
    return Comparison(plan, rows, toys, time.perf_counter() - start)


def _evaluate(criterion: str, seed: int, trained: TrainedNet, peak: int | None, images: Halves) -> Row:
    net, unseen = trained.net, images[1]
    embeddings, labels = embed(net, unseen.images, normalize=False), unseen.labels
    pairs = balanced_pairs(labels, seed=seed)
    same, scores = pairs.same.numpy(), pair_scores(embeddings, pairs)
    found = verify_scores(same, scores, fars=TAR_FARS)
    gallery, probes = split_gallery(labels, seed=seed)
    halves = embeddings[gallery], labels[gallery], embeddings[probes], labels[probes]
    who = identify(*halves, fpirs=(_FPIR,))
    _, counts = histograms(1 + scores, True, {"same": same, "different": ~same})
    shown = criterion in WITH_DISTANCES
    people = set_of(MemoryImages(unseen), "unseen")
    parts = np.array_split(trained.losses, min(LOSSES, len(trained.losses)))
    return Row(
        criterion=criterion,
        seed=seed,
        accuracy=found.accuracy,
        eer=found.eer,
        tar={f"{far:g}": rate for far, rate in found.tar.items()},
        rank1=who.rank(1),
        rank5=who.rank(5),
        tpir=who.tpir[_FPIR],
        seconds=trained.seconds,
        head_milliseconds=trained.head_milliseconds,
        peak_bytes=peak,
        first_loss=trained.losses[0],
        last_loss=trained.losses[-1],
        roc=[float(found.true_accepts[found.false_accepts <= far].max()) for far in ROC_FARS],
        same_angles=counts["same"],
        different_angles=counts["different"],
        distances=_by_distance(net, embeddings, pairs, halves, images[0]) if shown else {},
        losses=[float(np.mean(part)) for part in parts],
        hardest=hardest_pairs(1 + scores, pairs, people.paths, Thumbnails([people]), count=3) if shown else [],
    )


def _by_distance(
    net: nn.Module,
    embeddings: Tensor,
    pairs: Pairs,
    halves: tuple[Tensor, Tensor, Tensor, Tensor],
    trained: LabeledImages,
) -> dict[str, dict[str, float]]:
    """Compare embeddings by every distance, not normalized beforehand.

    ``halves`` are embeddings and labels of the gallery and of the probes. The Mahalanobis distance is fitted on the
    people that the net was trained on.
    """
    distances: dict[str, Distance] = {
        "Euclidean": Euclidean(),
        "1-norm": PNorm(1),
        "3-norm": PNorm(3),
        "inner product": InnerProduct(),
        "cosine": Cosine(),
        "Mahalanobis": Mahalanobis.fit(embed(net, trained.images, normalize=False)),
    }
    same = pairs.same.numpy()
    found = {}
    for name, distance in distances.items():
        scores = pair_scores(embeddings, pairs, distance)
        found[name] = {
            "accuracy": verify_scores(same, scores, fars=()).accuracy,
            "tar": tar_at_far(same, scores, 1e-2),
            "rank1": identify(*halves, distance=distance, max_rank=1).rank(1),
        }
    return found


def _toy(plan: Plan, criterion: Criterion, folder: Folder, reporter: Reporter) -> Toy:
    task, seed = plan.toy, plan.seeds[0]
    assert task is not None
    stored = folder.toy(criterion.name)
    if stored is None:
        reporter.begin(f"{criterion.name}, two dimensions", task.recipe.steps)
        data, _ = task.images.load(seed)
        net = train(criterion, task, data, seed, reporter).net
        stored = embed(net, data.images, normalize=False).numpy(), data.labels.numpy()
        folder.add_toy(criterion.name, stored)
    return stored
