"""Checks of the numbers and choices that a margin is made with. Errors name the margin's class and the argument."""

from __future__ import annotations

import math
from typing import Any, get_args


def check_number(owner: object, name: str, value: object, rule: str, low: float, high: float, closed: bool) -> None:
    """Check that a value is a number in ``[low, high)``, or in ``[low, high]`` if closed.

    Args:
        owner: the margin, named in errors by its class.
        name: the argument's name.
        value: the argument.
        rule: the range as text, for errors.
        low: lower limit, included.
        high: upper limit.
        closed: True if the upper limit is included.

    Raises:
        TypeError: if the value is not a number.
        ValueError: if it is out of range.
    """
    label = f"{type(owner).__name__}: {name}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{label} must be a number; got {type(value).__name__}")
    if not (low <= value < high or (closed and value == high)):
        raise ValueError(f"{label} must be in {rule}; got {value}")


def check_angle(owner: object, name: str, value: object) -> None:
    """Check that a value is an angle in [0, π) radians."""
    check_number(owner, name, value, "[0, π) radians", 0, math.pi, closed=False)


def check_factor(owner: object, name: str, value: object) -> None:
    """Check that a value is a factor of the angle, in [1, 4]."""
    check_number(owner, name, value, "[1, 4]", 1, 4, closed=True)


def check_difference(owner: object, name: str, value: object) -> None:
    """Check that a value can be subtracted from a cosine: it is in [0, 2)."""
    check_number(owner, name, value, "[0, 2)", 0, 2, closed=False)


def check_rate(owner: object, name: str, value: object) -> None:
    """Check that a value is the rate of a running mean, in (0, 1]."""
    check_number(owner, name, value, "(0, 1]", math.ulp(0), 1, closed=True)


def check_choice(owner: object, name: str, value: object, choices: Any) -> None:
    """Check that a value is one of a ``Literal``'s.

    Raises:
        ValueError: if it is not.
    """
    if value not in get_args(choices):
        listed = ", ".join(repr(choice) for choice in get_args(choices))
        raise ValueError(f"{type(owner).__name__}: {name} must be one of {listed}; got {value!r}")
