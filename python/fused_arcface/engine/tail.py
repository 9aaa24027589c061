"""The O(N) end of the head: from each row's negative log-sum-exp and target cosine to the reduced loss.

Plain PyTorch, so autograd carries any margin through it; every backend, and one shard or many, end here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..base.checks import check_margin_output, check_margin_rows
from ..base.once_differentiable import once_differentiable
from ..base.statistics import MarginSoftmaxStats
from ..margins.angular import Margin, parameters
from .ops import for_scale
from .smoothing import Smoothing


class _FusedMarginLoss(torch.autograd.Function):
    """Compute the reduced loss, differentiable, and the rows' losses and full log-sum-exps by a backend's margin_loss.

    One node in the graph stands for all of it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        negative_lse: Tensor,
        target_cosine: Tensor,
        ignored: Tensor,
        reduction: str,
        scale: float,
        m1: float,
        m2: float,
        m3: float,
        boundary: str,
        gradient: str,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        margin_loss, factor = for_scale(torch.ops.fused_arcface.margin_loss, scale)
        loss, lse, d_lse, d_cosine = margin_loss(
            negative_lse, target_cosine, factor, m1, m2, m3, boundary, gradient, backend
        )
        loss = loss.masked_fill_(ignored, 0)
        count = (~ignored).sum() if reduction == "mean" else None
        ctx.save_for_backward(d_lse, d_cosine, ignored, count)
        reduced = loss.clone() if reduction == "none" else loss.sum() if count is None else loss.sum() / count
        ctx.mark_non_differentiable(loss, lse)
        ctx.set_materialize_grads(False)
        return reduced, loss, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: tuple[Any, ...], d_reduced: Tensor | None, _loss: None, _lse: None
    ) -> tuple[Tensor | None, ...]:
        if d_reduced is None:
            return (None,) * 11
        d_lse, d_cosine, ignored, count = saved
        d_loss = d_reduced if count is None else d_reduced / count
        d_loss = d_loss.expand_as(d_lse).masked_fill(ignored, 0)
        return d_loss * d_lse, d_loss * d_cosine, *(None for _ in range(9))


def reduce_loss(loss: Tensor, ignored: Tensor, reduction: str) -> Tensor:
    """Reduce row losses ``(N,)``, 0 where ignored, as ``cross_entropy`` does.

    Ignored rows are neither in the sum nor in the number that the mean divides by.
    """
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
    backend: str = "torch",
    penalty: Tensor | None = None,
    smoothed: Smoothing | None = None,
) -> tuple[Tensor, MarginSoftmaxStats]:
    """Return the reduced loss, differentiable, and the rows' statistics.

    Args:
        negative_lse: (N,) log-sum-exp of the row's negative logits over all shards.
        target_cosine: (N,).
        negative_max: (N,) greatest cosine among the row's negatives.
        ignored: (N,) bool.
        margin: The map of target cosines to modified cosines.
        scale: The factor of the logits.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        backend: that of the other stages; one that fuses this tail does so for the margins of this package.
        penalty: (N,) added to the rows' losses.
        smoothed: label smoothing.
    """
    feature = "fused_margin_fp64" if negative_lse.dtype == torch.float64 else "fused_margin"
    fuses = backends.has(backend, feature) and smoothed is None and penalty is None
    numbers = parameters(margin) if fuses else None
    if numbers is not None:
        reduced, loss, lse = _FusedMarginLoss.apply(
            negative_lse, target_cosine, ignored, reduction, float(scale), *numbers, backend
        )
    elif hasattr(margin, "row_losses"):
        loss = margin.row_losses(target_cosine.clone(), negative_lse.exp(), scale)
        check_margin_rows("loss", loss, target_cosine)
        loss, lse = loss.masked_fill(ignored, 0), negative_lse.detach()
        reduced = reduce_loss(loss, ignored, reduction)
    else:
        modified = margin(target_cosine.clone())  # a copy: a user's margin may work in place
        check_margin_output(modified, target_cosine)
        target_logit = scale * modified
        # softplus, not log(exp + exp) - z, which cancels for well-classified rows; past 40 it is linear to fp64's
        # last bit.
        loss = F.softplus(negative_lse - target_logit, threshold=40)
        lse = torch.logaddexp(negative_lse.detach(), target_logit.detach())
        if smoothed is not None:
            loss = smoothed.loss(loss, target_cosine, target_logit, scale)
        if penalty is not None:
            loss = loss + penalty
        loss = loss.masked_fill(ignored, 0)
        reduced = reduce_loss(loss, ignored, reduction)
    cosine = target_cosine.detach()
    # For booleans a > b is a and not b.
    stats = MarginSoftmaxStats(loss.detach(), lse, cosine, correct=(cosine > negative_max) > ignored)
    return reduced, stats
