"""The training step, its batches and its learning rate. Who calls it consumes the steps one by one: progress, checks
and an
interruption are the caller's."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from ..data.images import LabeledImages


@dataclass(frozen=True)
class Recipe:
    """How a net is trained: AdamW, its learning rate rising and falling once."""

    steps: int
    batch_size: int
    learning_rate: float
    """The greatest."""
    warm_up: float = 0.25
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 5e-4


class Step(NamedTuple):
    """What one step tells."""

    loss: float
    head_seconds: float
    """Of the head alone, forward and backward to the gradients by embeddings and class centers."""


def shuffled_batches(data: LabeledImages, batch_size: int, steps: int, seed: int) -> Iterator[LabeledImages]:
    """Batches of exactly ``batch_size``, drawn without replacement until too few are left, then anew; the same for a
    seed.

    Raises:
        ValueError: fewer images than a batch holds.

    >>> data = LabeledImages(torch.zeros(9, 1, 2, 2), torch.arange(9))
    >>> [len(batch.labels) for batch in shuffled_batches(data, batch_size=4, steps=3, seed=0)]
    [4, 4, 4]
    """
    total = len(data.labels)
    if total < batch_size:
        raise ValueError(f"batch_size must be <= the number of images {total}; got {batch_size}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(total, generator=generator)
        rows, order = order[:batch_size], order[batch_size:]
        yield LabeledImages(data.images[rows], data.labels[rows])


def one_cycle(parameters: Iterable[nn.Parameter], recipe: Recipe) -> tuple[Optimizer, LRScheduler]:
    """The recipe's optimizer and schedule.

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
    """torch computes on one thread meanwhile.

    A step of a small net has too little in each operation to share: one thread takes 1.3 times as long as two on a
    quiet machine, and a third of the time where another process wants a processor. It also makes results independent
    of their number.

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
    optimizer: Optimizer,
    scheduler: LRScheduler,
    batches: Iterable[LabeledImages],
    before_update: Callable[[Tensor, Tensor], None] | None = None,
) -> Iterator[Step]:
    """One step for each batch, made when it is asked for.

    Args:
        net: images to embeddings.
        head: ``head(embeddings, target)`` gives the loss.
        optimizer: of both.
        scheduler: stepped after each batch.
        batches: what to train on.
        before_update: called with the embeddings (N, D), detached, and the labels (N,) while the parameters are still
            those that the loss was computed with.

    >>> from fused_arcface.app.training import SmallNet, SoftmaxHead
    >>> data = LabeledImages(torch.rand(8, 1, 8, 8), torch.arange(8) % 2)
    >>> net, head = SmallNet(4), SoftmaxHead(4, 2)
    >>> optimizer, scheduler = one_cycle([*net.parameters(), *head.parameters()], Recipe(3, 4, 0.01))
    >>> len(list(training_steps(net, head, optimizer, scheduler, shuffled_batches(data, 4, steps=3, seed=0))))
    3
    """
    net.train()
    for images, target in batches:
        embeddings = net(images)
        optimizer.zero_grad()
        # The head's backward pass stops at the embeddings, so that its time can be told from the net's.
        cut = embeddings.detach().requires_grad_()
        start = time.perf_counter()
        loss = head(cut, target)
        loss.backward()
        head_seconds = time.perf_counter() - start
        if before_update is not None:
            before_update(embeddings.detach(), target)
        embeddings.backward(cut.grad)
        optimizer.step()
        scheduler.step()
        yield Step(loss.item(), head_seconds)
