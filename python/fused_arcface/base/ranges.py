"""The one check of a number: its type, and the range that it must lie in."""

from __future__ import annotations

import math
from typing import NamedTuple


class Range(NamedTuple):
    """A range of numbers and the words that an error message has for it."""

    rule: str
    low: float
    high: float
    has_low: bool = True
    has_high: bool = False


POSITIVE = Range("finite and > 0", 0, math.inf, has_low=False)
NOT_NEGATIVE = Range("finite and >= 0", 0, math.inf)
FROM_0 = Range("in [0, inf)", 0, math.inf)
FROM_0_BELOW_1 = Range("in [0, 1.0)", 0, 1)
FROM_0_TO_1 = Range("in [0, 1]", 0, 1, has_high=True)
ABOVE_0_TO_1 = Range("in (0, 1]", 0, 1, has_low=False, has_high=True)


def check_number(name: str, value: object, allowed: Range) -> None:
    """Check that an argument is a number in a range.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is outside the range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number; got {type_of_number(value)}")
    # Comparisons, not math.isfinite: under torch.compile a number may be symbolic.
    above = allowed.low < value or (allowed.has_low and value == allowed.low)
    if not (above and (value < allowed.high or (allowed.has_high and value == allowed.high))):
        raise ValueError(f"{name} must be {allowed.rule}; got {value}")


def type_of_number(value: object) -> str:
    """Return the type of a value that is no Python number, and advice for a number of NumPy or a 0-dim tensor."""
    converts = hasattr(type(value), "__float__") and getattr(value, "ndim", 0) == 0 and not isinstance(value, bool)
    return type(value).__name__ + (": pass it as float(...)" if converts else "")
