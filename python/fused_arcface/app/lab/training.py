"""Train one net: its recipe, its steps, and the reporter of its progress. Demo and comparison both train here."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from ..data.images import LabeledImages
from ..nets.small import SmallNet
from .criteria import Criterion
from .plans import Recipe, Task


class StepRecord(NamedTuple):
    """The record of one training step."""

    loss: float
    head_seconds: float
    """Time of the head alone: forward, and backward to the gradients by embeddings and class centers."""


class Reporter(Protocol):
    """Shows the progress of an experiment."""

    def begin(self, what: str, steps: int = 0) -> None:
        """Begin a piece of work: a training of ``steps``, or something without steps if it is 0."""

    def step(self, loss: float) -> None:
        """Count one training step."""

    def ended(self, name: str, first_loss: float, last_loss: float, steps: int, seconds: float) -> None:
        """Note a training that has ended, in this run or in the earlier one that it resumes."""


BeforeUpdate = Callable[[nn.Module, Tensor, Tensor], None]
"""Called with the head, the embeddings (N, D), detached, and the labels (N,), before the parameters change."""


@dataclass(frozen=True)
class TrainedNet:
    """A net and the record of its training."""

    net: nn.Module
    losses: list[float]
    """The loss of each step."""
    head_milliseconds: float
    """Median time of the head's forward and backward pass, on one thread."""
    seconds: float


def train(
    criterion: Criterion,
    task: Task,
    data: LabeledImages,
    seed: int,
    reporter: Reporter,
    before_update: BeforeUpdate | None = None,
) -> TrainedNet:
    """Train a new net of a task with one criterion; ``seed`` decides the initial weights and the batches.

    The net is made before the head, so all criteria start from the same net. The caller's random state is left as it
    was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SmallNet(task.embedding_dim, data.images.shape[1])
        head = criterion.make_head(task.embedding_dim, data.num_identities)
        batches = criterion.batches(data, task.recipe.batch_size, task.recipe.steps, seed)
        start, losses, head_seconds = time.perf_counter(), [], []
        for step in training_steps(net, head, task.recipe, batches, before_update):
            losses.append(step.loss)
            head_seconds.append(step.head_seconds)
            reporter.step(step.loss)
    return TrainedNet(net, losses, 1e3 * statistics.median(head_seconds), time.perf_counter() - start)


def one_cycle(parameters: Iterable[nn.Parameter], recipe: Recipe) -> tuple[Optimizer, LRScheduler]:
    """Return the recipe's optimizer and learning-rate schedule.

    >>> recipe = Recipe(steps=10, batch_size=4, learning_rate=1.0)
    >>> optimizer, scheduler = one_cycle(nn.Linear(2, 2).parameters(), recipe)
    >>> f"{optimizer.param_groups[0]['lr']:.2f}"  # it rises from here
    '0.04'
    """
    optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, weight_decay=recipe.weight_decay)
    return optimizer, OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=max(2, recipe.steps), pct_start=recipe.warm_up
    )


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread within the block.

    The operations of a small net are too short to share. On a quiet machine one thread takes 1.3 times as long as two;
    if another process uses a processor, it takes a third of the time. Results then do not depend on the number of
    processors either.

    >>> with one_thread():
    ...     torch.get_num_threads()
    1
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def training_steps(
    net: nn.Module,
    head: nn.Module,
    recipe: Recipe,
    batches: Iterable[LabeledImages],
    before_update: BeforeUpdate | None = None,
) -> Iterator[StepRecord]:
    """Yield the record of one step for each batch; a step is made when it is asked for.

    ``head(embeddings, target)`` gives the loss. ``before_update`` is called while the parameters are still those that
    the loss was computed with.
    """
    optimizer, scheduler = one_cycle([*net.parameters(), *head.parameters()], recipe)
    net.train()
    for images, target in batches:
        embeddings = net(images)
        optimizer.zero_grad()
        # The head's backward pass stops at the embeddings, so that its time is measured without the net's.
        cut = embeddings.detach().requires_grad_()
        start = time.perf_counter()
        loss = head(cut, target)
        loss.backward()
        head_seconds = time.perf_counter() - start
        if before_update is not None:
            before_update(head, embeddings.detach(), target)
        embeddings.backward(cut.grad)
        optimizer.step()
        scheduler.step()
        yield StepRecord(loss.item(), head_seconds)
