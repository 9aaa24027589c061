"""Values of JSON files as the types of this package. The files may be anybody's, so each value is checked."""

from __future__ import annotations

import math
import types
from dataclasses import is_dataclass
from typing import Any, get_args, get_origin, get_type_hints


def typed(kind: Any, value: Any) -> Any:
    """Return a value of JSON as a type.

    Args:
        kind: ``str``, ``bool``, ``int``, ``float``, ``list[…]``, ``tuple[…, …]``, one of these ``| None``, a dataclass
            (in JSON an object; fields with a default may be missing) or a named tuple (in JSON a list).
        value: what ``json.loads`` returned.

    Raises:
        ValueError, OverflowError: if a value is of another type, is missing, or is a number that is not finite.

    >>> typed(tuple[int, list[float]], [1, [2, 0.5]])
    (1, [2.0, 0.5])
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin is types.UnionType:
        return None if value is None else typed(parts[0], value)
    if origin is list and isinstance(value, list):
        return [typed(parts[0], each) for each in value]
    if origin is tuple and isinstance(value, list):
        return tuple(typed(part, each) for part, each in zip(parts, value, strict=True))
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind in (str, bool, int) and type(value) is kind:
        return value
    shape: Any = dict if is_dataclass(kind) else list if hasattr(kind, "_fields") else ()
    if isinstance(value, shape):
        hints = get_type_hints(kind)
        named = dict(zip(hints, value, strict=True)) if isinstance(value, list) else value
        values = {name: typed(hint, named[name]) for name, hint in hints.items() if name in named}
        try:
            return kind(**values)
        except TypeError as error:  # a field without a default is missing
            raise ValueError(str(error)) from None
    expected = "a finite number" if kind is float else getattr(kind, "__name__", kind)
    raise ValueError(f"{str(value)[:40]} must be {expected}")
