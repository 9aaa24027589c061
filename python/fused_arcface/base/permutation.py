"""A pseudorandom permutation that is a function of a key, to draw a sample without a table of all ids."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from .keyed_random import fold, fold_each

ROUNDS = 6  # three full Feistel rounds; with two, neighboring ids are drawn together measurably more often


def grid_of(size: int) -> tuple[int, int]:
    """Return a and b of the ``a × b`` grid whose cells a permutation of ``0..size-1`` maps."""
    a = math.isqrt(size - 1) + 1
    return a, -(-size // a)


class KeyedPermutation(Protocol):
    """A pseudorandom permutation of ``0..size-1``. All implementations give the same numbers for a key."""

    def __init__(self, size: int, key: int, device: torch.device) -> None: ...

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the images of ids (K,) int64 in [0, size)."""
        ...

    def inverse(self, images: Tensor) -> Tensor:
        """Return the ids with these images (K,) int64 in [0, size)."""
        ...


class Permutation:
    """A keyed permutation of ``0..size-1``: an unbalanced Feistel network over the cells of an ``a × b`` grid.

    The grid has at least ``size`` cells, and fewer than a cells more. The round functions are tables of random numbers
    of the key, with a or b entries (about √size). A cell past ``size`` is mapped again until the result is an id. A
    table holds that result for each such cell, so no value is read and a GPU is not waited for.
    """

    def __init__(self, size: int, key: int, device: torch.device) -> None:
        self.size = size
        self.a, self.b = grid_of(size)
        self._tables = []
        for step in range(ROUNDS):
            inputs, outputs = (self.b, self.a) if step % 2 == 0 else (self.a, self.b)
            words = fold_each(fold(key, step), torch.arange(inputs, device=device))
            self._tables.append(((words >> 32) & 0x7FFFFFFF) % outputs)
        beyond = torch.arange(size, self.a * self.b, device=device)
        self._beyond = self._ends(self._map(beyond))
        self._beyond_inverse = self._ends(self._map_back(beyond))

    def _map(self, cells: Tensor) -> Tensor:
        left, right = cells // self.b, cells % self.b
        for step, table in enumerate(self._tables):
            if step % 2 == 0:
                left = left + table.index_select(0, right)
                left -= self.a * (left >= self.a)
            else:
                right = right + table.index_select(0, left)
                right -= self.b * (right >= self.b)
        return left * self.b + right

    def _map_back(self, cells: Tensor) -> Tensor:
        left, right = cells // self.b, cells % self.b
        for step, table in reversed(list(enumerate(self._tables))):
            if step % 2 == 0:
                left = left - table.index_select(0, right)
                left += self.a * (left < 0)
            else:
                right = right - table.index_select(0, left)
                right += self.b * (right < 0)
        return left * self.b + right

    def _ends(self, images: Tensor) -> Tensor:
        """Return the ids at which the walks of the cells past ``size`` end, from the images of these cells."""
        # Each turn doubles the steps of an entry's walk, and no walk is longer than the number of such cells.
        for _ in range(len(images).bit_length()):
            images = self._walk(images, images)
        return images

    def _walk(self, cells: Tensor, beyond: Tensor) -> Tensor:
        """Return the cells, with those past ``size`` replaced by their entries of the table ``beyond``."""
        if len(beyond) == 0:
            return cells
        further = beyond.index_select(0, (cells - self.size).clamp_(min=0))
        return torch.where(cells < self.size, cells, further)

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the images of ids (K,) int64 in [0, size)."""
        return self._walk(self._map(ids), self._beyond)

    def inverse(self, images: Tensor) -> Tensor:
        """Return the ids with these images (K,) int64 in [0, size)."""
        return self._walk(self._map_back(images), self._beyond_inverse)
