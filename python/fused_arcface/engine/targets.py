"""The targets of a step's rows and the weights of the rows, as a head hands them to the engine."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .terms import IGNORED


class Target(NamedTuple):
    """One label of each row, for all ranks' rows."""

    label: Tensor
    """(N,) int64 global class, ``IGNORED`` or ``INVALID``."""
    local: Tensor
    """(N,) int64 index into the classes that the step uses on this rank, or negative."""


class Rows(NamedTuple):
    """The facts about all ranks' rows beside their embeddings."""

    target: Target
    sample_weight: Tensor | None = None
    """(N,) factor of each row's loss, of any float dtype; None: each row's is 1."""

    @property
    def ignored(self) -> Tensor:
        """(N,) bool: rows whose loss is 0, and which a mean does not count."""
        return self.target.label == IGNORED
