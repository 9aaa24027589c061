"""Nested state, taken apart into what torch.distributed.checkpoint stores and put together again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .row_shard import RowShard


@dataclass(frozen=True)
class _Stored:
    """In a saved structure, the place of the tensor that is stored under ``key``."""

    key: str


def split(value: Any, key: str, tensors: dict[str, Any]) -> Any:
    """``value`` with its tensors taken out into ``tensors``: torch.distributed.checkpoint stores those by shards, but
    keeps neither lists nor keys that are numbers."""
    if isinstance(value, Tensor):
        tensors[key] = value
        return _Stored(key)
    if isinstance(value, dict):
        return {name: split(item, f"{key}.{name}", tensors) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(split(item, f"{key}.{place}", tensors) for place, item in enumerate(value))
    return value


def join(structure: Any, tensors: dict[str, Any]) -> Any:
    """The opposite of :func:`split`; row shards become ordinary tensors."""
    if isinstance(structure, _Stored):
        tensor = tensors[structure.key]
        return tensor.rows if isinstance(tensor, RowShard) else tensor
    if isinstance(structure, dict):
        return {name: join(item, tensors) for name, item in structure.items()}
    if type(structure) in (list, tuple):
        return type(structure)(join(item, tensors) for item in structure)
    return structure
