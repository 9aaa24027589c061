"""The comparison itself: trainings, verification, identification. It prints nothing; a reporter is told what goes
on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
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
from ..measure.child import Child
from ..nets.small import SmallNet, embed
from .comparison_memory import peak_of_steps
from .comparison_record import ANGLE_BINS, ROC_FARS, TAR_FARS, Folder, Row
from .criteria import ARCFACE, SOFTMAX, Criterion, criteria
from .plan import Plan
from .steps import Recipe, Step, one_cycle, one_thread, training_steps

_FPIR = 0.1

WITH_DISTANCES = (SOFTMAX, ARCFACE)
"""Criteria whose nets are evaluated by every distance."""


class Reporter(Protocol):
    """Who is told what the comparison does."""

    def begin(self, what: str, steps: int = 0) -> None:
        """A piece of work begins; ``steps`` of training, or one without steps."""

    def step(self, loss: float) -> None:
        """A step of training was made."""

    def finished(self, row: Row) -> None:
        """A training has ended, now or in an earlier run, and its net was evaluated."""


@dataclass(frozen=True)
class Comparison:
    """All that a comparison found."""

    plan: Plan
    rows: list[Row]
    toys: dict[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]
    """By criterion: embeddings (M, 2) of a net with two dimensions, and labels (M,)."""
    seconds: float
    """Of this run; of an interrupted one, since it went on."""

    def of(self, criterion: str) -> list[Row]:
        """A criterion's rows, by seed."""
        return [row for row in self.rows if row.criterion == criterion]


def run_comparison(plan: Plan, output: Path, reporter: Reporter, names: tuple[str, ...] | None = None) -> Comparison:
    """Run a plan, or what an earlier run of it left undone.

    Args:
        plan: what to do.
        output: folder that finished trainings are kept in, see :mod:`fused_arcface.app.lab.comparison_record`.
        reporter: told of progress.
        names: of criteria; None for all.

    Raises:
        ValueError: a name that is none.
        ComparisonError: the folder holds another plan's results.
        DataError: the plan's data do not do.
        MissingExtra: scikit-learn or pytorch-metric-learning is not installed.
    """
    start = time.perf_counter()
    every = criteria()
    unknown = [name for name in names or () if name not in every]
    if unknown:
        raise ValueError(f"criteria must be among {', '.join(every)}; got {', '.join(unknown)}")
    chosen = [every[name] for name in names or every]
    folder = Folder(output, plan)
    rows = []
    with one_thread(), Child() as child:
        for seed in plan.seeds:
            for row in _rows_of_seed(plan, seed, chosen, folder, child, reporter):
                reporter.finished(row)
                rows.append(row)
        toys = {criterion.name: _toy(plan, criterion, folder, reporter) for criterion in chosen}
    order = [criterion.name for criterion in chosen]
    rows.sort(key=lambda row: order.index(row.criterion))  # stable: by seed within a criterion
    return Comparison(plan, rows, toys, time.perf_counter() - start)


def _rows_of_seed(
    plan: Plan, seed: int, chosen: list[Criterion], folder: Folder, child: Child, reporter: Reporter
) -> Iterator[Row]:
    images: tuple[LabeledImages, LabeledImages] | None = None
    for criterion in chosen:
        row = folder.row(criterion.name, seed)
        if row is None:
            if images is None:
                reporter.begin(f"images, seed {seed}")
                images = plan.load(seed)
            trained, unseen = images
            reporter.begin(f"{criterion.name}, seed {seed}", plan.recipe.steps)
            start = time.perf_counter()
            net, steps = _train(criterion, plan.recipe, plan.embedding_dim, trained, seed, reporter)
            seconds = time.perf_counter() - start
            # The same in each seed, so it is measured in one.
            earlier = folder.row(criterion.name, plan.seeds[0])
            channels, size = trained.images.shape[1], trained.images.shape[2]
            peak = (
                peak_of_steps(criterion.name, plan, channels, size, trained.num_identities, child)
                if earlier is None
                else earlier.peak_bytes
            )
            row = _evaluate(criterion.name, seed, net, steps, seconds, peak, trained, unseen)
            folder.add(row)
        yield row


def _train(
    criterion: Criterion, recipe: Recipe, embedding_dim: int, data: LabeledImages, seed: int, reporter: Reporter
) -> tuple[nn.Module, list[Step]]:
    # Every criterion starts from the same net: it is made first. The caller's random state is left as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SmallNet(embedding_dim, data.images.shape[1])
        head = criterion.make_head(embedding_dim, data.num_identities)
        optimizer, scheduler = one_cycle([*net.parameters(), *head.parameters()], recipe)
        batches = criterion.batches(data, recipe.batch_size, recipe.steps, seed)
        steps = []
        for step in training_steps(net, head, optimizer, scheduler, batches):
            steps.append(step)
            reporter.step(step.loss)
    return net, steps


def _evaluate(
    criterion: str,
    seed: int,
    net: nn.Module,
    steps: list[Step],
    seconds: float,
    peak: int | None,
    trained: LabeledImages,
    unseen: LabeledImages,
) -> Row:
    embeddings, labels = embed(net, unseen.images, normalize=False), unseen.labels
    pairs = balanced_pairs(labels, seed=seed)
    same, scores = pairs.same.numpy(), pair_scores(embeddings, pairs)
    found = verify_scores(same, scores, fars=TAR_FARS)
    split = split_gallery(labels, seed=seed)
    who = identify(*_split(embeddings, labels, split), fpirs=(_FPIR,))
    angles = np.degrees(np.arccos(np.clip(1 + scores, -1, 1)))
    histograms = [np.histogram(angles[same == kind], ANGLE_BINS, (0, 180))[0].tolist() for kind in (True, False)]
    return Row(
        criterion=criterion,
        seed=seed,
        accuracy=found.accuracy,
        eer=found.eer,
        tar={f"{far:g}": rate for far, rate in found.tar.items()},
        rank1=who.rank(1),
        rank5=who.rank(5),
        tpir=who.tpir[_FPIR],
        seconds=seconds,
        head_milliseconds=statistics.median(step.head_seconds for step in steps) * 1e3,
        peak_bytes=peak,
        first_loss=steps[0].loss,
        last_loss=steps[-1].loss,
        roc=[float(found.true_accepts[found.false_accepts <= far].max()) for far in ROC_FARS],
        same_angles=histograms[0],
        different_angles=histograms[1],
        distances=_by_distance(net, embeddings, labels, pairs, split, trained) if criterion in WITH_DISTANCES else {},
    )


def _by_distance(
    net: nn.Module,
    embeddings: Tensor,
    labels: Tensor,
    pairs: Pairs,
    split: tuple[Tensor, Tensor],
    trained: LabeledImages,
) -> dict[str, dict[str, float]]:
    """Embeddings as the net gives them, compared by every distance; the Mahalanobis distance is fitted on those of the
    people that the net was trained on."""
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
            "rank1": identify(*_split(embeddings, labels, split), distance=distance, max_rank=1).rank(1),
        }
    return found


def _split(embeddings: Tensor, labels: Tensor, split: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gallery, probes = split
    return embeddings[gallery], labels[gallery], embeddings[probes], labels[probes]


def _toy(
    plan: Plan, criterion: Criterion, folder: Folder, reporter: Reporter
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    stored = folder.toy(criterion.name)
    if stored is None:
        reporter.begin(f"{criterion.name}, two dimensions", plan.toy.steps)
        data = plan.toy_images()
        net, _ = _train(criterion, plan.toy, 2, data, plan.seeds[0], reporter)
        stored = embed(net, data.images, normalize=False).numpy(), data.labels.numpy()
        folder.add_toy(criterion.name, *stored)
    return stored
