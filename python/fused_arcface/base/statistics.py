"""The rows' statistics that every head, the function and the oracle return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MarginSoftmaxStats(NamedTuple):
    """The statistics of each row of a step, detached.

    Ignored rows have loss 0 and are not correct. Their other two numbers have no meaning.
    """

    loss: Tensor
    """(N,) loss, unreduced."""
    lse: Tensor
    """(N,) log-sum-exp of all the row's logits: of its negatives, and of its target with the margin. SphereFace2 and
    UniFace have another number here: the logarithm of the sum of the negatives' losses, before its weight."""
    target_cosine: Tensor
    """(N,) cosine between the embedding and its class center, without the margin."""
    correct: Tensor
    """(N,) bool: the target is the nearest class center, without the margin (a tie is not correct)."""
