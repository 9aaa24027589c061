"""Class centers as tensors that pass in pieces: join sets of them, add classes, keep one center of each class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..base.keyed_random import CENTER_STD, fill_normal
from ..base.reading import DataError

_NEW_ROWS = 1 << 16  # drawn at once


class ConvertError(DataError):
    """A source is of another kind than its name says, or the sources do not fit each other."""


class ConvertOptionError(ConvertError):
    """An option is out of its range, or the sources do not allow it."""


@dataclass
class Rows:
    """A tensor whose rows come in pieces, so that it may be larger than memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]
    """Its rows in order."""

    @classmethod
    def of(cls, tensor: Tensor) -> Rows:
        """Return a tensor in memory as one piece."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: iter([tensor]))


def _joined(parts: Sequence[Rows]) -> Rows:
    """Return the rows of all parts, in the dtype of the first."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return Rows(parts[0].dtype, shape, lambda: chain.from_iterable(part.pieces() for part in parts))


@dataclass
class Centers:
    """Class centers and, from a checkpoint, the values that belong to them."""

    tensors: dict[str, Rows]
    """``weight`` (C_total·sub_centers, D), the centers of a class one after another, and a fused optimizer's
    ``momentum_buffer`` and ``momentum_scale``."""
    values: dict[str, Any] = field(default_factory=dict)
    """``step``, ``seed``, ``sub_centers`` and the fused optimizer's options ``optimizer``, if the source has them."""
    notes: list[str] = field(default_factory=list)
    """Parts of the source that the result lacks, in words."""

    @property
    def sub_centers(self) -> int:
        return self.values.get("sub_centers", 1)

    @property
    def num_classes(self) -> int:
        return self.tensors["weight"].shape[0] // self.sub_centers


def merge(sources: Sequence[Centers]) -> Centers:
    """Join all classes of all sources: ids in the order of the sources, and only the tensors that all have.

    Raises:
        ConvertError: if the sources have different embedding dimensions.
    """
    if len(sources) == 1:
        return sources[0]
    for source in sources[1:]:
        own, first = source.tensors["weight"].shape[1], sources[0].tensors["weight"].shape[1]
        if own != first:
            raise ConvertError(f"sources must have the same embedding dimension; got {first} and {own}")
        if source.sub_centers != sources[0].sub_centers:
            both = f"{sources[0].sub_centers} and {source.sub_centers}"
            raise ConvertError(f"sources must have the same sub_centers; got {both}")
    tensors = {}
    for name in set.intersection(*(set(source.tensors) for source in sources)):
        parts = [source.tensors[name] for source in sources]
        if all(part.dtype == parts[0].dtype for part in parts) or name == "weight":
            tensors[name] = _joined(parts)
    notes = [note for source in sources for note in source.notes]
    if any(name not in tensors for source in sources for name in source.tensors):
        notes.append("the momentum of the class centers is left out: not all sources have it in the same dtype")
    return Centers(tensors, dict(sources[0].values), notes)


def grow(source: Centers, num_classes: int, seed: int) -> Centers:
    """Add new classes after those of ``source``, up to ``num_classes``.

    New centers are those of a new head, keyed by seed and class id, without momentum. The kept rows are unchanged.

    Raises:
        ConvertError: if the source has more than ``num_classes``.
    """
    kept = source.num_classes
    if num_classes < kept:
        raise ConvertOptionError(f"classes must be >= {kept}, those of the source; got {num_classes}")

    first, last = kept * source.sub_centers, num_classes * source.sub_centers

    def new_rows(name: str, rows: Rows) -> Iterator[Tensor]:
        for start in range(first, last, _NEW_ROWS):
            piece = torch.zeros(min(_NEW_ROWS, last - start), *rows.shape[1:], dtype=rows.dtype)
            if name == "weight":
                fill_normal(piece, seed, start, CENTER_STD)
            yield piece

    tensors = {}
    for name, rows in source.tensors.items():
        added = Rows(rows.dtype, (last - first, *rows.shape[1:]), partial(new_rows, name, rows))
        tensors[name] = _joined([rows, added])
    return Centers(tensors, dict(source.values), source.notes)


def keep_dominant(source: Centers, dominant: Tensor) -> Centers:
    """Keep one center of each class, with its momentum.

    Args:
        source: centers with several of each class.
        dominant: (C,) integers: the center to keep, as :func:`fused_arcface.sub_centers.dominant` returns it.

    Raises:
        ConvertError: if ``dominant`` does not have one center's number for each class.
    """
    count = source.sub_centers
    if dominant.dim() != 1 or len(dominant) != source.num_classes or dominant.is_floating_point():
        got = f"{tuple(dominant.shape)} {dominant.dtype}"
        raise ConvertError(f"dominant must be integers (C={source.num_classes},); got {got}")
    low, high = (int(each) for each in torch.aminmax(dominant))
    if low < 0 or high >= count:
        raise ConvertError(f"dominant must be in [0, sub_centers={count}); got {low if low < 0 else high}")
    kept = torch.arange(len(dominant)) * count + dominant.long()  # ascending rows of weight

    def chosen(rows: Rows) -> Iterator[Tensor]:
        start = 0
        for piece in rows.pieces():
            first, last = torch.searchsorted(kept, torch.tensor([start, start + len(piece)])).tolist()
            yield piece[kept[first:last] - start]
            start += len(piece)

    tensors = {
        name: Rows(rows.dtype, (len(dominant), *rows.shape[1:]), partial(chosen, rows))
        for name, rows in source.tensors.items()
    }
    return Centers(tensors, {**source.values, "sub_centers": 1}, source.notes)
