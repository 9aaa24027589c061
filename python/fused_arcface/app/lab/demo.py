"""The demo's experiment: train with the fused and the reference head, compare them, verify, and measure costs.

It prints nothing; a reporter shows its progress.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from fused_arcface.evaluation import Verification, verify

from ..benchmark.cases import Case
from ..nets.small import embed
from .agreement import Agreement
from .cost import HeadCost, head_costs
from .criteria import ARCFACE, MARGIN, SCALE, SOFTMAX, Criterion, criteria
from .heads import ReferenceHead
from .plans import Plan, Task
from .training import Reporter, TrainedNet, one_thread, train

REFERENCE = Criterion(
    "ArcFace, reference",
    "the oracle",
    lambda dim, classes: ReferenceHead(dim, classes, margin=MARGIN, scale=SCALE),
    color="#000000",
)
"""ArcFace by the reference head, trained from the first seed alone."""

SHOWN = (SOFTMAX, "NormSoftmax", ARCFACE)
"""Criteria that are trained from each seed."""

PIXELS = "pixels, no net"


@dataclass(frozen=True)
class VerifiedNet:
    """One training, and how well its net verifies unseen identities."""

    seed: int
    trained: TrainedNet
    verification: Verification


@dataclass(frozen=True)
class TaskResult:
    """Everything that was found on one task."""

    task: Task
    num_identities: int
    nets: dict[str, list[VerifiedNet]]
    """By criterion, then by seed."""
    pixels: list[Verification]
    """Verification of each seed by the cosine of the images themselves, without a net."""
    agreement: Agreement
    """Of the first seed's ArcFace and reference."""

    @property
    def head_case(self) -> Case:
        """The shape at which the head was trained."""
        return Case(self.task.recipe.batch_size, self.num_identities, self.task.embedding_dim)

    def verifications(self) -> dict[str, list[Verification]]:
        """Return the verifications by name, by seed: the bare pixels, then each criterion."""
        found = {name: [net.verification for net in nets] for name, nets in self.nets.items()}
        return {PIXELS: self.pixels, **found}


@dataclass(frozen=True)
class Demo:
    """Everything that one run found."""

    plan: Plan
    results: list[TaskResult]
    costs: list[HeadCost]
    """Cost of the head at the shape of each task and at those of the plan."""
    seconds: float

    def broken(self) -> list[str]:
        """Describe each bound on the agreement that is not kept; none when all is well."""
        return [f"{result.task.name}: {what}" for result in self.results for what in result.agreement.broken()]


def run_demo(plan: Plan, reporter: Reporter) -> Demo:
    """Run a plan.

    Raises:
        MissingExtra: if scikit-learn is not installed.
    """
    start = time.perf_counter()
    with one_thread():
        results = [_solve(task, plan.seeds, reporter) for task in plan.tasks]
    reporter.begin("time and memory of the head")
    # Smallest first, see head_costs.
    cases = sorted({*(result.head_case for result in results), *plan.shapes}, key=lambda case: case.N * case.C)
    return Demo(plan, results, head_costs(cases, plan.seconds), time.perf_counter() - start)


def _solve(task: Task, seeds: tuple[int, ...], reporter: Reporter) -> TaskResult:
    agreement, pixels = Agreement(), []
    nets: dict[str, list[VerifiedNet]] = {name: [] for name in (*SHOWN, REFERENCE.name)}
    for seed in seeds:
        reporter.begin(f"{task.name}: images, seed {seed}")
        trained, unseen = task.images.load(seed)
        pixels.append(verify(unseen.images.flatten(1), unseen.labels))
        first = seed == seeds[0]
        for criterion in (*(criteria()[name] for name in SHOWN), *((REFERENCE,) if first else ())):
            reporter.begin(f"{task.name}: {criterion.name}, seed {seed}", task.recipe.steps)
            check = agreement if first and criterion.name == ARCFACE else None
            net = train(criterion, task, trained, seed, reporter, check)
            found = verify(embed(net.net, unseen.images), unseen.labels)
            nets[criterion.name].append(VerifiedNet(seed, net, found))
            name = f"{task.name}, {criterion.name}, seed {seed}"
            reporter.ended(name, net.losses[0], net.losses[-1], len(net.losses), net.seconds)
    agreement.compare_curves(*(nets[name][0].trained.losses for name in (ARCFACE, REFERENCE.name)))
    return TaskResult(task, trained.num_identities, nets, pixels, agreement)
