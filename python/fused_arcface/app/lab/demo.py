"""The experiment itself: trainings, comparisons, verification, costs. It prints nothing; a reporter is told what goes
on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from fused_arcface.evaluation import Verification, verify
from fused_arcface.head import MarginHead
from fused_arcface.margins.angular import NormSoftmax

from ..benchmark.cases import Case
from ..data import LabeledImages
from ..nets.small import SmallNet, embed
from .agreement import StepAgreement, curve_broken, curve_difference
from .cost import Cost, head_costs
from .criteria import SCALE
from .heads import ReferenceHead, SoftmaxHead
from .problems import MARGIN, Plan, Problem
from .steps import one_cycle, one_thread, shuffled_batches, training_steps

SOFTMAX, ARCFACE, REFERENCE = "softmax", "ArcFace", "ArcFace, reference"

HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    SOFTMAX: SoftmaxHead,
    "NormSoftmax": lambda dim, classes: MarginHead(dim, classes, margin=NormSoftmax(), scale=SCALE),
    ARCFACE: lambda dim, classes: MarginHead(dim, classes, margin=MARGIN, scale=SCALE),
    REFERENCE: lambda dim, classes: ReferenceHead(dim, classes, margin=MARGIN, scale=SCALE),
}
"""Every criterion: from (D, C) to its head. All but the last are trained from each seed."""


class Reporter(Protocol):
    """Who is told what the demo does."""

    def begin(self, what: str, steps: int = 0) -> None:
        """A piece of work begins; ``steps`` of training, or one without steps."""

    def step(self, loss: float) -> None:
        """A step of training was made."""

    def trained(self, training: Training) -> None:
        """A training has ended and its net was verified."""


@dataclass(frozen=True)
class Training:
    """One training and what its net is worth."""

    problem: str
    criterion: str
    seed: int
    losses: list[float]
    head_milliseconds: float
    """Median of the head's forward and backward pass in this training, on one thread."""
    seconds: float
    verification: Verification


@dataclass(frozen=True)
class Result:
    """All of one problem."""

    problem: Problem
    num_identities: int
    trainings: list[Training]
    pixels: list[Verification]
    """By seed: verification by the cosine of the images themselves, without a net."""
    agreement: StepAgreement
    curve_difference: float

    @property
    def head_case(self) -> Case:
        """The shape at which the head was trained."""
        return Case(self.problem.recipe.batch_size, self.num_identities, self.problem.embedding_dim)

    def of(self, criterion: str) -> list[Training]:
        """The trainings of one criterion, by seed."""
        return [training for training in self.trainings if training.criterion == criterion]

    def broken(self) -> list[str]:
        """Bounds on the agreement that are not kept, in words."""
        return [
            f"{self.problem.name}: {what}" for what in (*self.agreement.broken(), *curve_broken(self.curve_difference))
        ]


@dataclass(frozen=True)
class Demo:
    """All that one run found."""

    plan: Plan
    results: list[Result]
    costs: list[Cost]
    """Of the head, at the shape of each problem and at the plan's large one."""
    seconds: float

    def broken(self) -> list[str]:
        """Bounds on the agreement that are not kept, in words; none when all is well."""
        return [what for result in self.results for what in result.broken()]


def run_demo(plan: Plan, reporter: Reporter) -> Demo:
    """Run a plan; on one machine the same plan gives the same, to the bit, but for times and memory.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    start = time.perf_counter()
    with one_thread():
        results = [_solve(problem, plan, reporter) for problem in plan.problems]
    reporter.begin("time and memory of the head")
    costs = head_costs([*(result.head_case for result in results), plan.large], plan.seconds)
    return Demo(plan, results, costs, time.perf_counter() - start)


def _solve(problem: Problem, plan: Plan, reporter: Reporter) -> Result:
    trainings, pixels = [], []
    agreement: StepAgreement | None = None
    num_identities = 0
    for seed in plan.seeds:
        reporter.begin(f"{problem.name}: images, seed {seed}")
        trained, unseen = problem.load(seed)
        num_identities = trained.num_identities
        pixels.append(verify(unseen.images.flatten(1), unseen.labels))
        for criterion, make_head in HEADS.items():
            if criterion == REFERENCE and seed != plan.seeds[0]:
                continue
            # Every criterion starts from the same net: it is made first. The caller's random state is left as it was.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                net = SmallNet(problem.embedding_dim)
                head = make_head(problem.embedding_dim, num_identities)
            check = None
            if criterion == ARCFACE and agreement is None:
                assert isinstance(head, MarginHead)
                check = agreement = StepAgreement(head)
            trainings.append(_train(problem, criterion, seed, net, head, trained, unseen, check, reporter))
            reporter.trained(trainings[-1])
    assert agreement is not None
    first = {training.criterion: training for training in trainings if training.seed == plan.seeds[0]}
    difference = curve_difference(first[ARCFACE].losses, first[REFERENCE].losses)
    return Result(problem, num_identities, trainings, pixels, agreement, difference)


def _train(
    problem: Problem,
    criterion: str,
    seed: int,
    net: nn.Module,
    head: nn.Module,
    trained: LabeledImages,
    unseen: LabeledImages,
    check: StepAgreement | None,
    reporter: Reporter,
) -> Training:
    recipe = problem.recipe
    reporter.begin(f"{problem.name}: {criterion}, seed {seed}", recipe.steps)
    optimizer, scheduler = one_cycle([*net.parameters(), *head.parameters()], recipe)
    batches = shuffled_batches(trained, recipe.batch_size, recipe.steps, seed)
    start = time.perf_counter()
    steps = []
    for step in training_steps(net, head, optimizer, scheduler, batches, check):
        steps.append(step)
        reporter.step(step.loss)
    seconds = time.perf_counter() - start
    return Training(
        problem=problem.name,
        criterion=criterion,
        seed=seed,
        losses=[step.loss for step in steps],
        head_milliseconds=statistics.median(step.head_seconds for step in steps) * 1e3,
        seconds=seconds,
        verification=verify(embed(net, unseen.images), unseen.labels),
    )
