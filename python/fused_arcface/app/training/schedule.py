"""Learning rate, margin and scale as functions of the step: nothing is saved.

A resumed run follows its present options.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from fused_arcface.margins.schedule import Rise


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


def parse_rise(text: str, steps_per_epoch: int = 1) -> Rise:
    """Return the rise that a text such as ``exponential:20-40`` or ``linear:1-10:0.5`` names.

    The text is ``SHAPE:FIRST-LAST[:START]``. FIRST and LAST are epochs, counted from 1: the rise begins with epoch
    FIRST and is complete when epoch LAST begins.

    Raises:
        ValueError: if the text has another form, or a number is out of its range.

    >>> parse_rise("linear:2-4:0.5", steps_per_epoch=10)
    Rise(begin=10.0, end=30.0, start=0.5, shape='linear')
    """
    number = r"([0-9]{1,9}(?:\.[0-9]{1,9})?)"
    found = re.fullmatch(rf"(exponential|linear):{number}-{number}(?::{number})?", text)
    if found is None:
        raise ValueError(f"must be exponential:FIRST-LAST or linear:FIRST-LAST, with :START or without; got {text!r}")
    first, last = float(found[2]), float(found[3])
    if not 1 <= first < last:
        raise ValueError(f"must have epochs with 1 <= FIRST < LAST; got {text!r}")
    start = float(found[4] or 0)
    if start > 1:
        raise ValueError(f"must have START from 0 to 1; got {text!r}")
    shape: Any = found[1]
    return Rise((first - 1) * steps_per_epoch, (last - 1) * steps_per_epoch, start, shape)
