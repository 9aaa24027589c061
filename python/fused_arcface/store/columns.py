"""The columns of a row: a class center and the optimizer's numbers that belong to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_PIECE_BYTES = 64 << 20

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
        """Return the columns of tensors with the same number of rows, on any device, also ``meta``."""
        return cls(tuple(Column(name, tensor.dtype, tensor.shape[1]) for name, tensor in tensors.items()))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return sum(column.bytes for column in self.each)

    def pieces(self, first: int, last: int) -> list[tuple[int, int]]:
        """Return the ranges (first row, row after the last one) of few enough rows to be read at once."""
        step = max(1, _PIECE_BYTES // self.row_bytes)
        return [(start, min(start + step, last)) for start in range(first, last, step)]

    def empty(self, count: int, device: torch.device | None = None, pinned: bool = False) -> Tensors:
        """Return uninitialized rows."""
        return {
            column.name: torch.empty(count, column.width, dtype=column.dtype, device=device, pin_memory=pinned)
            for column in self.each
        }


class Buffers:
    """Two sets of rows that are used in turn: one step uses a set while the copies of the other are still on their way.

    They grow to the largest sample so far. Allocating memory in each step would cost more than the copies.
    """

    def __init__(self, columns: Columns, device: torch.device, pinned: bool = False) -> None:
        self._columns, self._device, self._pinned = columns, device, pinned
        self._sets: list[Tensors] = [{}, {}]

    def rows(self, turn: int, count: int) -> Tensors:
        """Return ``count`` rows of the set whose turn it is. The former content is lost."""
        held = self._sets[turn % 2]
        if not held or len(next(iter(held.values()))) < count:
            room = math.ceil(count * 1.1)  # samples differ a little in size
            held = self._sets[turn % 2] = self._columns.empty(room, self._device, self._pinned)
        return {name: tensor[:count] for name, tensor in held.items()}


def gather(source: Tensor, rows: Tensor, out: Tensor) -> None:
    """Fill ``out`` (K, width) with rows (K,) of ``source``."""
    source, out = _in_words(source, out)
    torch.index_select(source, 0, rows, out=out)


def some_rows(tensors: Tensors, places: Tensor) -> Tensors:
    """Return the rows at some places (K,), ascending; the tensors themselves if these are all."""
    if len(places) == len(tensors["weight"]):
        return tensors
    return {name: tensor[places] for name, tensor in tensors.items()}


def scatter(to: Tensor, rows: Tensor, source: Tensor) -> None:
    """Replace rows (K,) of ``to`` by ``source`` (K, width)."""
    to, source = _in_words(to, source)
    to.index_copy_(0, rows, source)


def _in_words(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return rows as 64-bit words if all consist of whole words: torch moves element by element, int8 too."""
    for tensor in tensors:
        size = tensor.element_size()
        if not tensor.is_contiguous() or tensor.shape[1] * size % 8 or tensor.storage_offset() * size % 8:
            return tensors
    return tuple(tensor.view(torch.int64) for tensor in tensors)
