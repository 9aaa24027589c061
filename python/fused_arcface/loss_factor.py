"""The factor that a loss is multiplied by before ``backward()``, which :mod:`fused_arcface.center_sgd` divides out: one
below 1 is refused. On a GPU it is read when the GPU has got there, so that nobody waits for it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor


def is_refused(factor: Tensor) -> Tensor:
    """0-dim bool: a finite factor below 1. One that is not finite is an overflow, and the step is skipped."""
    return (factor < 1) & (factor > -math.inf)


def read_later(factor: Tensor) -> Callable[[], float | None]:
    """Start a copy of a GPU's number to the host. The function returned gives it, or None as long as it is on its way.

    Inside of a CUDA graph nothing can be read: always None.
    """
    if torch.cuda.is_current_stream_capturing():
        return lambda: None
    on_host = torch.empty((), dtype=factor.dtype, pin_memory=True)
    on_host.copy_(factor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(factor.device))
    return lambda: float(on_host) if arrived.query() else None


class RefusedFactors:
    """Factors of the steps so far, in the order of the steps, that have not been read yet."""

    def __init__(self) -> None:
        self._unread: deque[Callable[[], float | None]] = deque(maxlen=1000)

    def see(self, factor: Tensor) -> float | None:
        """The factor, if it is to be refused now; on a GPU :meth:`overdue` will give it."""
        if factor.is_cuda:
            self._unread.append(read_later(factor))
            return None
        return float(factor) if is_refused(factor) else None

    def overdue(self) -> float | None:
        """The first factor of an earlier step that was refused, of those that have arrived; None if there is none."""
        while self._unread:
            factor = self._unread[0]()
            if factor is None:
                return None
            self._unread.popleft()
            if -math.inf < factor < 1:
                return factor
        return None
