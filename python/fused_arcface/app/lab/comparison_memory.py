"""Memory of a training step by criterion, measured in a process of its own."""

from __future__ import annotations

import itertools

import torch

from ..benchmark.memory import can_measure, peak_since_reset, reset_peak
from ..data import LabeledImages
from ..measure.child import Child
from ..nets.small import SmallNet
from .criteria import criteria
from .plan import Plan
from .steps import Recipe, one_cycle, training_steps

_WARM, _MEASURED = 2, 4


def peak_of_steps(criterion: str, plan: Plan, channels: int, size: int, num_classes: int, child: Child) -> int | None:
    """Peak extra bytes of training steps, beyond the images, parameters and optimizer; None where they cannot be told.

    Args:
        criterion: name of one.
        plan: its recipe and embedding dimension count.
        channels, size: of the images.
        num_classes: C.
        child: the process that measures.
    """
    if not can_measure(torch.device("cpu")):
        return None
    peak: int = child.call(
        "lab.comparison_memory:measure",
        criterion=criterion,
        batch_size=plan.recipe.batch_size,
        embedding_dim=plan.embedding_dim,
        channels=channels,
        size=size,
        num_classes=num_classes,
    )
    return peak


def measure(criterion: str, batch_size: int, embedding_dim: int, channels: int, size: int, num_classes: int) -> int:
    """What :func:`peak_of_steps` asks its child process for."""
    torch.set_num_threads(1)
    chosen = criteria()[criterion]
    images = torch.rand(4 * max(num_classes, batch_size), channels, size, size)
    data = LabeledImages(images, torch.arange(len(images)) % num_classes)
    net = SmallNet(embedding_dim, channels)
    head = chosen.make_head(embedding_dim, num_classes)
    steps = _WARM + _MEASURED
    optimizer, scheduler = one_cycle([*net.parameters(), *head.parameters()], Recipe(steps, batch_size, 0.01))
    run = training_steps(net, head, optimizer, scheduler, chosen.batches(data, batch_size, steps, 0))
    # First what is made once: the optimizer's state, the libraries' code.
    for _ in itertools.islice(run, _WARM):
        pass
    optimizer.zero_grad()
    cpu = torch.device("cpu")
    before = reset_peak(cpu)
    for _ in run:
        pass
    return max(0, peak_since_reset(cpu) - before)
