"""The learning rate as a function of the step: nothing is saved, and a resumed run follows its present options."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A linear warm-up, then a fall to 0 (or none).

    Args:
        steps: number of steps of the whole training.
        kind: ``"cosine"``; ``"polynomial"``, ``(1 - progress)^power``; or ``"constant"``.
        power: exponent of the polynomial.
        warm_up: share of the steps in which the rate rises, in [0, 1].
    """

    steps: int
    kind: str = "cosine"
    power: float = 2.0
    warm_up: float = 0.1

    def factor(self, step: int) -> float:
        """Return the factor of the highest learning rate in a step; the first step is 0.

        >>> [Schedule(steps=8, kind="polynomial", power=1, warm_up=0.5).factor(step) for step in range(8)]
        [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
        """
        rising = round(self.warm_up * self.steps)
        if step < rising:
            return (step + 1) / rising
        progress = min((step - rising) / max(1, self.steps - rising), 1.0)
        if self.kind == "cosine":
            return (1 + math.cos(math.pi * progress)) / 2
        return (1 - progress) ** self.power if self.kind == "polynomial" else 1.0
