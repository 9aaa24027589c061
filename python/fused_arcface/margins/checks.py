"""Checks of the numbers and choices that a margin is made with. Errors name the margin's class and the argument."""

from __future__ import annotations

import math
from typing import Any, get_args

from ..base import ranges
from ..base.ranges import Range

ANGLE = Range("in [0, π) radians", 0, math.pi)
DIFFERENCE = Range("in [0, 2)", 0, 2)
"""The range of a number that is subtracted from a cosine."""
FACTOR = Range("in [1, 4]", 1, 4, has_high=True)
FINITE = Range("in (-inf, inf)", -math.inf, math.inf, has_low=False)
ABOVE_0 = Range("in (0, inf)", 0, math.inf, has_low=False)


def check_number(owner: object, name: str, value: object, allowed: Range) -> None:
    """Check that an argument of a margin, the owner, is a number in a range. Raises TypeError, ValueError."""
    ranges.check_number(f"{type(owner).__name__}: {name}", value, allowed)


def check_choice(owner: object, name: str, value: object, choices: Any) -> None:
    """Check that a value is one of a ``Literal``'s. Raises ValueError."""
    if value not in get_args(choices):
        listed = ", ".join(repr(choice) for choice in get_args(choices))
        raise ValueError(f"{type(owner).__name__}: {name} must be one of {listed}; got {value!r}")
