"""One training step: the net in micro-batches, and the head once on the joint batch.

The fused optimizer updates the class centers in the head's backward pass, so gradients cannot be accumulated over
several passes of the head. Instead the embeddings are collected: all but the last micro-batch are embedded without a
graph, the head sees the whole batch once, and each micro-batch is embedded again for its backward pass, with the
gradient that the head gave its embeddings (Gao et al., GradCache, arXiv:2101.06983). The result is that of the whole
batch, except that batch normalization takes its statistics from each micro-batch. It costs 1 - 1/parts more forward
passes of the net.
"""

from __future__ import annotations

import contextlib
import time
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fused_arcface.base.keyed_random import NET, fold
from fused_arcface.base.statistics import MarginSoftmaxStats
from fused_arcface.partial_fc import PartialFC

from .buffers import SavedBuffers

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class StepResult(NamedTuple):
    """Figures of a step."""

    loss: float
    """Mean over all ranks."""
    stats: MarginSoftmaxStats
    """Figures of this rank's rows."""
    head_seconds: float
    """Time of the head's forward and backward pass."""
    updated: bool = True
    """Loss and gradients were finite, so weights and class centers were changed."""


class JointStep:
    """Runs the forward and backward pass of a joint batch; the caller steps the optimizer.

    Args:
        net: module from images to embeddings; in ``DistributedDataParallel`` if there are several ranks.
        head: the head, called on this rank's embeddings.
        precision: key of :data:`AUTOCAST`.
        scaler: gradient scaler; disabled unless the precision is fp16.
        seed: key of the net's random numbers, together with step and micro-batch: a resumed run draws the same.
    """

    def __init__(
        self, net: nn.Module, head: PartialFC, precision: str, scaler: torch.amp.GradScaler, seed: int = 0
    ) -> None:
        self._net, self._head, self._scaler, self._seed = net, head, scaler, seed
        self._bare: nn.Module = net.module if isinstance(net, DistributedDataParallel) else net
        self._dtype = AUTOCAST[precision]

    def __call__(self, parts: list[Tensor], target: Tensor, number: int, *, frozen: bool = False) -> StepResult:
        """Compute the net's gradients in place; the head's optimizer updates the class centers.

        Args:
            parts: this rank's images (n, channels, size, size), cut into micro-batches.
            target: (n,) their labels.
            number: number of the step, from 0.
            frozen: train only the class centers; the net is in evaluation mode and gets no gradient.
        """
        if frozen:
            with torch.no_grad():
                embedded = [self._embed(self._bare, parts, place, number) for place in range(len(parts))]
            return self._head_step(torch.cat(embedded), target)[1]
        before = SavedBuffers(self._bare) if len(parts) > 1 else SavedBuffers()
        with torch.no_grad():
            embeddings = [self._embed(self._bare, parts, place, number) for place in range(len(parts) - 1)]
            # Running statistics count each micro-batch once: in the pass that has a graph.
            before.restore()
        with self._without_exchange(len(parts) > 1):
            last = self._embed(self._net, parts, len(parts) - 1, number)
            gradient, result = self._head_step(torch.cat([*embeddings, last.detach()]), target)
            gradients = gradient.split([len(part) for part in parts])
            last.backward(gradients[-1])
        for place in range(len(parts) - 1):
            with self._without_exchange(place < len(parts) - 2):
                self._embed(self._net, parts, place, number).backward(gradients[place])
        return result

    def _head_step(self, embeddings: Tensor, target: Tensor) -> tuple[Tensor, StepResult]:
        """Run the head forward and backward; return the gradient by the embeddings (n, D) and the figures."""
        cut = embeddings.requires_grad_()
        timer = Timer(cut.device)
        with self._autocast(cut.device):
            loss, stats = self._head(cut, target, return_stats=True)
        self._scaler.scale(loss).backward()
        timer.stop()
        assert cut.grad is not None
        return cut.grad, StepResult(loss.item(), stats, timer.seconds())

    def _embed(self, net: nn.Module, parts: list[Tensor], place: int, number: int) -> Tensor:
        """Return embeddings (n, D) of a micro-batch in fp32: their gradient must not overflow in half precision."""
        part = self._head.ranks.rank * len(parts) + place
        torch.manual_seed(fold(self._seed, NET, number, part) >> 1)
        with self._autocast(parts[place].device):
            embeddings: Tensor = net(parts[place])
        return embeddings.float()

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        return torch.autocast(device.type, self._dtype, enabled=self._dtype is not None)

    def _without_exchange(self, wanted: bool) -> AbstractContextManager[object]:
        """Return a context in which, if ``wanted``, ranks do not exchange gradients."""
        if wanted and isinstance(self._net, DistributedDataParallel):
            return self._net.no_sync()
        return contextlib.nullcontext()


class Timer:
    """Measures seconds from its construction to :meth:`stop`, on the device that does the work."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()
        self._start, self._end = time.perf_counter(), 0.0

    def stop(self) -> None:
        self._end = time.perf_counter()
        if self._events:
            self._events[1].record()

    def seconds(self) -> float:
        """Return the seconds; waits until the device has reached :meth:`stop`."""
        if self._events:
            self._events[1].synchronize()
            return self._events[0].elapsed_time(self._events[1]) / 1e3
        return self._end - self._start
