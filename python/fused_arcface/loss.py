"""The O(N) end of the head: from each row's negative log-sum-exp and target cosine to the reduced loss.

Plain PyTorch, so autograd carries any margin through it; every backend, and one shard or many, end here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_margin_output
from .margins import Margin


class MarginSoftmaxStats(NamedTuple):
    """What a step knows of each row, detached. Ignored rows have loss 0 and are not correct."""

    loss: Tensor
    """(N,) loss, unreduced."""
    lse: Tensor
    """(N,) log-sum-exp of all the row's logits: its negatives' and its target's, the latter with the margin."""
    target_cosine: Tensor
    """(N,) cosine between the embedding and its class centre, without the margin."""
    correct: Tensor
    """(N,) bool: the target is the nearest class centre, without the margin (a tie is not correct)."""


def reduce_loss(loss: Tensor, ignored: Tensor, reduction: str) -> Tensor:
    """Row losses ``(N,)`` reduced as ``cross_entropy`` does: ignored rows count neither in the sum nor in the mean."""
    loss = loss.masked_fill(ignored, 0)
    if reduction == "none":
        return loss
    total = loss.sum()
    return total / (~ignored).sum() if reduction == "mean" else total


def loss_of_rows(
    negative_lse: Tensor,
    target_cosine: Tensor,
    negative_max: Tensor,
    ignored: Tensor,
    margin: Margin,
    scale: float,
    reduction: str,
) -> tuple[Tensor, MarginSoftmaxStats]:
    """Reduced loss, differentiable, and the rows' statistics.

    Args:
        negative_lse: (N,) log-sum-exp of the row's negative logits over all shards.
        target_cosine: (N,).
        negative_max: (N,) greatest cosine among the row's negatives.
        ignored: (N,) bool.
    """
    modified = margin(target_cosine)
    check_margin_output(modified, target_cosine)
    target_logit = scale * modified
    # softplus, not log(exp + exp) - z, which cancels for well-classified rows; past 40 it is linear to fp64's last bit.
    loss = F.softplus(negative_lse - target_logit, threshold=40)
    with torch.no_grad():
        stats = MarginSoftmaxStats(
            loss=loss.masked_fill(ignored, 0),
            lse=torch.logaddexp(negative_lse, target_logit),
            target_cosine=target_cosine.detach(),
            correct=(target_cosine > negative_max) & ~ignored,
        )
    return reduce_loss(loss, ignored, reduction), stats
