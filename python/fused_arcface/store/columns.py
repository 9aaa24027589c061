"""The columns of a row: a class center and the optimizer's numbers that belong to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
"""``weight`` (R, D) and, of a fused optimizer, ``momentum_buffer`` and ``momentum_scale``: R rows of each column."""


class Column(NamedTuple):
    """One tensor's part of a row."""

    name: str
    dtype: torch.dtype
    width: int

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * self.width


@dataclass(frozen=True)
class Columns:
    """All columns of a row, in the order of the file."""

    each: tuple[Column, ...]

    @classmethod
    def of(cls, tensors: Tensors) -> Columns:
        """Return the columns of tensors of equally many rows; they may be on any device, ``meta`` included."""
        return cls(tuple(Column(name, tensor.dtype, tensor.shape[1]) for name, tensor in tensors.items()))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return sum(column.bytes for column in self.each)

    def empty(self, count: int, device: torch.device | None = None, pinned: bool = False) -> Tensors:
        """Return uninitialized rows."""
        return {
            column.name: torch.empty(count, column.width, dtype=column.dtype, device=device, pin_memory=pinned)
            for column in self.each
        }


class Buffers:
    """Two sets of rows that are used in turn: one step's while the copies of the other are still on their way.

    They grow to the largest sample so far. Fresh memory in each step would cost more than the copies do.
    """

    def __init__(self, columns: Columns, device: torch.device, pinned: bool = False) -> None:
        self._columns, self._device, self._pinned = columns, device, pinned
        self._sets: list[Tensors] = [{}, {}]

    def rows(self, turn: int, count: int) -> Tensors:
        """Return ``count`` rows of the set whose turn it is. Its last content is lost."""
        held = self._sets[turn % 2]
        if not held or len(next(iter(held.values()))) < count:
            room = math.ceil(count * 1.1)  # samples differ a little in size
            held = self._sets[turn % 2] = self._columns.empty(room, self._device, self._pinned)
        return {name: tensor[:count] for name, tensor in held.items()}
