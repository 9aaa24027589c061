"""Measure time and memory of the head, fused and reference, and memory of whole training steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fused_arcface import backends

from ..benchmark.cases import Case, make_inputs
from ..benchmark.memory import can_measure, peak_since_reset, peaks_of, reset_peak
from ..benchmark.providers import select
from ..data import LabeledImages
from ..measure.child import Child, ChildFailed
from ..measure.timing import time_interleaved
from ..nets.small import SmallNet
from .criteria import criteria
from .plans import Task
from .training import training_steps

_CPU = torch.device("cpu")
_WARM_STEPS, _MEASURED_STEPS = 2, 4


@dataclass
class HeadCost:
    """Cost of the head's forward and backward pass, by ``"fused"`` and ``"reference"``."""

    case: Case
    milliseconds: dict[str, float]
    """Medians of warm passes, taken in turn."""
    peak_bytes: dict[str, int | None]
    """Resident memory of a separate process beyond inputs, class centers and the two gradients; None where it was not
    measured."""
    problem: str | None = None
    """Reason why something was not measured."""


def head_costs(cases: Sequence[Case], seconds: float) -> list[HeadCost]:
    """Measure both heads at some shapes, in ``seconds`` for each.

    Pass the smallest shape first: memory that the allocator keeps from a smaller shape cannot hold a larger one.
    """
    (fused,), (reference,) = select(["fused_arcface"], backends.select("auto", _CPU)), select(["eager"])
    heads = {"fused": fused, "reference": reference}
    costs = []
    with Child() as of_fused, Child() as of_reference:
        children = {"fused": of_fused, "reference": of_reference}
        for case in cases:
            inputs = make_inputs(case, _CPU)
            runs = {name: head.timed(inputs, backward=True) for name, head in heads.items()}
            medians = {name: timing.median for name, timing in time_interleaved(runs, _CPU, seconds).items()}
            cost = HeadCost(case, medians, dict.fromkeys(heads))
            for name, head in heads.items():
                try:
                    cost.peak_bytes[name] = peaks_of(head, case, _CPU, children[name])["fwd+bwd"]
                except (MemoryError, ChildFailed, OSError) as error:
                    cost.problem = f"memory of the {name} head at {case} not measured: {error}"
            costs.append(cost)
    return costs


def peak_of_steps(criterion: str, task: Task, data: LabeledImages, child: Child) -> int | None:
    """Return the peak bytes of training steps beyond images, parameters and optimizer; None if it cannot be measured.

    The data give the shape of the images and the number of identities.
    """
    if not can_measure(_CPU):
        return None
    return child.call(_peak, criterion, task, data.images.shape[1:], data.num_identities)


def _peak(criterion: str, task: Task, image_shape: torch.Size, num_classes: int) -> int:
    chosen, recipe = criteria()[criterion], replace(task.recipe, steps=_WARM_STEPS + _MEASURED_STEPS)
    images = torch.rand(4 * max(num_classes, recipe.batch_size), *image_shape)
    data = LabeledImages(images, torch.arange(len(images)) % num_classes)
    net = SmallNet(task.embedding_dim, image_shape[0])
    head = chosen.make_head(task.embedding_dim, num_classes)
    run = training_steps(net, head, recipe, chosen.batches(data, recipe.batch_size, recipe.steps, 0))
    # The first steps allocate memory once: the optimizer's state, the libraries' code.
    for _ in itertools.islice(run, _WARM_STEPS):
        pass
    for module in (net, head):
        module.zero_grad()
    before = reset_peak(_CPU)
    for _ in run:
        pass
    return max(0, peak_since_reset(_CPU) - before)
