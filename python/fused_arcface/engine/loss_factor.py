"""The factor that a loss is multiplied by before ``backward()``. :mod:`fused_arcface.center_sgd` divides it out.

A factor below 1 is refused. On a GPU it is read once it has been computed, so that nobody waits for it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor


def is_refused(factor: Tensor) -> Tensor:
    """Return 0-dim bool: true for a finite factor below 1. If it is not finite, the step is skipped as an overflow."""
    return (factor < 1) & (factor > -math.inf)


def read_later(factor: Tensor) -> Callable[[], float | None]:
    """Start a copy of a GPU's number to the host. The function returned gives it, or None while it is on its way.

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
        """Return the factor if it is to be refused now; on a GPU :meth:`overdue` returns it later."""
        if factor.is_cuda:
            self._unread.append(read_later(factor))
            return None
        return float(factor) if is_refused(factor) else None

    def overdue(self) -> float | None:
        """Return the first refused factor of an earlier step among those that have arrived, or None."""
        while self._unread:
            factor = self._unread[0]()
            if factor is None:
                return None
            self._unread.popleft()
            if -math.inf < factor < 1:
                return factor
        return None
