"""Nested state, taken apart into tensors and JSON, and put together again."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .row_shard import RowShard

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith(("torch.q", "torch.bits"))
}
"""Element types of stored tensors by their names."""


@dataclass(frozen=True)
class _Stored:
    """Takes the place of a tensor in a saved structure; ``key`` is the name that the tensor is stored under."""

    key: str


def split(value: Any, key: str, tensors: dict[str, Any]) -> Any:
    """Return ``value`` with its tensors moved into ``tensors``, which torch.distributed.checkpoint stores by shards."""
    if isinstance(value, Tensor):
        tensors[key] = value
        return _Stored(key)
    if isinstance(value, dict):
        items = {name: split(item, f"{key}.{name}", tensors) for name, item in value.items()}
        return Counter(items) if isinstance(value, Counter) else items
    if type(value) in (list, tuple):
        return type(value)(split(item, f"{key}.{place}", tensors) for place, item in enumerate(value))
    return value


def join(structure: Any, tensors: dict[str, Any]) -> Any:
    """Return what :func:`split` took apart; row shards become ordinary tensors."""
    if isinstance(structure, _Stored):
        tensor = tensors[structure.key]
        return tensor.rows if isinstance(tensor, RowShard) else tensor
    if isinstance(structure, dict):
        items = {name: join(item, tensors) for name, item in structure.items()}
        return Counter(items) if isinstance(structure, Counter) else items
    if type(structure) in (list, tuple):
        return type(structure)(join(item, tensors) for item in structure)
    return structure


def to_json(value: Any, name: str) -> Any:
    """Return a structure of :func:`split` as JSON; a value that JSON lacks becomes ``{"$kind": ...}``.

    Raises:
        TypeError: if it holds an object of another kind, which a reader could only restore by running code. The
            message has the value's ``name``.
    """
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    if type(value) is list:
        return [to_json(item, f"{name}[{place}]") for place, item in enumerate(value)]
    if type(value) is dict and all(type(key) is str and not key.startswith("$") for key in value):
        return {key: to_json(item, f"{name}.{key}") for key, item in value.items()}
    for kind, (matches, content, _) in _KINDS.items():
        if matches(value):
            return {f"${kind}": to_json(content(value), name)}
    raise TypeError(
        f"{name} must be made of tensors, numbers, text, bytes, None, lists, tuples, sets and dicts, to be read "
        f"without running code; got {type(value).__module__}.{type(value).__qualname__}"
    )


def from_json(value: Any) -> Any:
    """Return the structure that :func:`to_json` wrote.

    Raises:
        ValueError, TypeError: if the value is not of this form.
    """
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if isinstance(value, dict):
        if len(value) == 1 and next(iter(value)).startswith("$"):
            kind, content = next(iter(value.items()))
            if kind[1:] not in _KINDS:
                raise ValueError(f"{kind} is not a known kind of value")
            return _KINDS[kind[1:]][2](from_json(content))
        return {key: from_json(item) for key, item in value.items()}
    return value


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: type(value) is kind


def _pairs(value: dict[Any, Any]) -> list[Any]:
    return [[key, item] for key, item in value.items()]


def _of_array(value: Any) -> list[Any]:
    """Return an array or a scalar of NumPy as dtype, shape and bytes."""
    return [value.dtype.str, list(value.shape), base64.b64encode(value.tobytes()).decode()]


def _array(content: list[Any]) -> Any:
    dtype, shape, data = np.dtype(str(content[0])), content[1], base64.b64decode(content[2])
    if dtype.hasobject or dtype.names:
        raise ValueError(f"an array of {dtype} is not an array of numbers")
    return np.frombuffer(data, dtype).reshape(shape).copy()


# For each kind three functions: is a value of this kind, value to JSON, JSON to value.
_KINDS: dict[str, tuple[Callable[[Any], bool], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "tensor": (_is(_Stored), lambda value: value.key, lambda key: _Stored(str(key))),
    "dict": (_is(dict), _pairs, dict),
    "tuple": (_is(tuple), list, tuple),
    "float": (_is(float), repr, lambda text: float(str(text))),
    "bytes": (_is(bytes), lambda value: base64.b64encode(value).decode(), base64.b64decode),
    "set": (_is(set), list, set),
    "frozenset": (_is(frozenset), list, frozenset),
    "complex": (_is(complex), lambda value: [value.real, value.imag], lambda parts: complex(*parts)),
    "counter": (_is(Counter), _pairs, lambda pairs: Counter(dict(pairs))),
    "size": (_is(torch.Size), list, torch.Size),
    "dtype": (_is(torch.dtype), lambda value: str(value).removeprefix("torch."), lambda name: DTYPES[name]),
    "device": (_is(torch.device), str, lambda name: torch.device(str(name))),
    "array": (
        lambda value: type(value) is np.ndarray and not value.dtype.hasobject and not value.dtype.names,
        _of_array,
        _array,
    ),
    "scalar": (
        lambda value: isinstance(value, np.number | np.bool_),
        _of_array,
        lambda content: _array(content)[()],
    ),
}
