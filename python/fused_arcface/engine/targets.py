"""The targets of a step's rows and the weights of the rows, as a head hands them to the engine."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .terms import IGNORED

Labels = Tensor | tuple[Tensor, Tensor, Tensor | float]
"""Labels as a caller gives them: (N,), or (first, second, share) for mixed labels."""


def labels_and_share(target: Labels) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the labels (N,) of a target that is checked already, and for mixed labels the second ones and the shares.

    Shares are (N,), between 0 and 1: that is checked here, where it is no wait.
    """
    if isinstance(target, Tensor):
        return target, None, None
    first, second, share = target
    if not isinstance(share, Tensor):
        # A product: torch.compile would make a graph for each share that fills a tensor.
        share = share * torch.ones(first.shape, dtype=torch.float64, device=first.device)
    share = torch.ops.fused_arcface.row_factors.default(share.expand(first.shape), "target[2]", 1.0)
    return first, second, share


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
    second: Target | None = None
    """Another label of each row, for mixed labels."""
    share: Tensor | None = None
    """(N,) in [0, 1]: the part of the loss that the first label has; with a second label."""
    all_count: bool = False
    """If true, the labels were read and none of them is ignored."""


# These are functions, since torch.compile of torch 2.8 does not follow a property of a NamedTuple.


def counted_rows(rows: Rows) -> Tensor:
    """Return (N,) bool: the rows that are not ignored."""
    counted = rows.target.label != IGNORED
    return counted if rows.second is None else counted | (rows.second.label != IGNORED)


def ignored_rows(rows: Rows) -> Tensor | None:
    """Return (N,) bool: the rows whose loss is 0, and which a mean does not count. None if it is known to be none."""
    return None if rows.all_count else ~counted_rows(rows)
